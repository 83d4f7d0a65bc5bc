"""SVDQuant on a GPU: the same codes every time, and what they compute is what the CPU computes."""

import pytest
import torch

import ptq4dm
from ptq4dm.record import replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def quantized(denoisers, kind, **options):
    model, store = denoisers.pair(kind)
    model = model.to("cuda")
    ptq4dm.quantize(model, ptq4dm.SVDQuantConfig(rank=8, num_tuples=4, **options), store)
    return model, store


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_the_same_codes_twice(kind, denoisers):
    (one, _), (two, _) = quantized(denoisers, kind), quantized(denoisers, kind)
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys() and any(name.endswith("qweight") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("activations", ["int4", "int8", "fp8"])
def test_agrees_with_the_cpu(activations, denoisers):
    model, store = quantized(denoisers, "dit", activations=activations)
    there = replay(model, store.calls).cpu()
    here = replay(model.to("cpu"), store.calls)
    assert float((there - here).norm() / here.norm()) < 0.02  # a sum that rounds to another code is one step off
