"""Weights kept in 8 bits within a budget: which, told and taken back; what is changed is never used."""

import copy

import pytest
import torch

import denoisers
import ptq4dm
from ptq4dm.calibration.record import ready
from ptq4dm.errors import UserError
from ptq4dm.inference import steps, unpacked, weight_cache
from ptq4dm.inference.blocks import compile_blocks
from ptq4dm.inference.weight_cache import Refreshed, bytes_of, keep_weights
from ptq4dm.kernels.formats.int4 import unpack_int4
from ptq4dm.svdquant.layers.svdq import SVDQLinear
from traced_graphs import TracedGraphs

pytestmark = pytest.mark.usefixtures("one_thread")


def eight_bits(qweight, wscales, activation):
    return unpack_int4(qweight, 64), wscales.float().amax(1)


@pytest.fixture
def kept(monkeypatch):
    """On a CPU no kernel unpacks: here one does, and takes 10 microseconds and 2 for a thousand bytes of codes."""
    monkeypatch.setattr(unpacked.svdq_linear, "unpacked", eight_bits)
    monkeypatch.setattr(unpacked.KeepsUnpacked, "unpacks", lambda self: self.plan.activation != "none")
    monkeypatch.setattr(weight_cache, "_microseconds", lambda layers: 10 + 2e-3 * layers[0].qweight.numel())


@pytest.fixture(scope="module")
def original():
    model, store = denoisers.pair("dit")
    quick = {"rank": 8, "num_tuples": 2, "smoothing": 0.5, "rounding": "nearest", "refinements": 0}
    ptq4dm.quantize(model, ptq4dm.SVDQuantConfig(activations="int8", **quick), store)
    return model, store.calls


@pytest.fixture
def quantized(original):
    """(A quantized model of its own, what gives its answer, named layers with 8-bit activations.)"""
    model = copy.deepcopy(original[0])
    call = ready(original[1], model)
    return model, lambda: model(*call.args, **call.kwargs)[0], layers_of(model)


def layers_of(model):
    return {
        name: one for name, one in model.named_modules() if type(one) is SVDQLinear and one.plan.activation != "none"
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("10B", 10), (77, 77)],
)
def test_budgets(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("wrong", ["4", "GB", "-1GB", "0MB", "4 apples", 0, 1.5, True, None, "nanGB"])
def test_what_is_no_budget(wrong):
    with pytest.raises(UserError, match=r'weight_cache is memory such as "4GB"'):
        bytes_of(wrong)


def size_of(layer):
    return 2 * layer.qweight.numel() + 4 * len(layer.wscales)


def kept_in(layers):
    return {name for name, one in layers.items() if one.eight_bits()[0] is not None}


def test_all_where_there_is_room_and_what_is_said(kept, quantized):
    model, _, layers = quantized
    report = ptq4dm.optimize(model, fused=False, compiled=False, weight_cache="1GB")
    total = sum(map(size_of, layers.values()))
    cache = report.models[""].cache
    assert kept_in(layers) == set(layers) == set(cache.kept) and cache.nbytes == total and not cache.left
    assert f"weights of {len(layers)} layers kept in 8 bits: {total / 1e9:.2f} GB more, which saves" in str(report)
    assert cache.saves == pytest.approx(sum(10 + 2e-3 * one.qweight.numel() for one in layers.values()))
    report.undo()
    assert not kept_in(layers) and not cache.nbytes and "forward" not in vars(model)
    assert all("_unpacked" not in vars(one) for one in layers.values())


def test_those_that_save_most_for_their_bytes_come_first(kept, quantized):
    """With a part of each time that is the same for all, small weights save most for their bytes."""
    model, _, layers = quantized
    sizes = sorted({size_of(one) for one in layers.values()})
    small = {name for name, one in layers.items() if size_of(one) == sizes[0]}
    assert len(sizes) > 1 and len(small) > 1
    cache = keep_weights({"": model}, sizes[0] * len(small))[""]
    assert kept_in(layers) == small and cache.left == len(layers) - len(small)
    assert f"{cache.left} layers unpack in every call: no room" in "\n".join(cache.lines())
    cache.clear()
    cache = keep_weights({"": model}, sizes[0] * (len(small) - 1))[""]
    assert kept_in(layers) == set(list(small_in_order(layers, small))[:-1])


def small_in_order(layers, small):
    return (name for name in layers if name in small)


def test_one_budget_for_all_denoisers(kept, quantized):
    model, _, layers = quantized
    other = copy.deepcopy(model)
    total = sum(map(size_of, layers.values()))
    caches = keep_weights({"a": model, "b": other}, total)
    assert sum(one.nbytes for one in caches.values()) <= total and all(one.kept for one in caches.values())


@pytest.mark.parametrize("how", ["written into", "moved", "loaded", "a scale written into"])
def test_codes_that_change_are_unpacked_again(kept, quantized, how):
    model, answer, layers = quantized
    report = ptq4dm.optimize(model, fused=False, compiled=False, weight_cache="1GB")
    name, layer = next(iter(layers.items()))
    with torch.no_grad():
        if how == "written into":
            layer.qweight.bitwise_xor_(17)
        elif how == "a scale written into":
            layer.wscales.mul_(2)
        elif how == "moved":
            layer.to(torch.float64)
        else:
            layer.load_state_dict(layer.state_dict())
        answer()
    assert layer.eight_bits() == (None, None) and kept_in(layers) == set(layers) - {name}
    assert f"1 layers unpack again, for their codes changed ('{name}')" in str(report)


def test_graphs_see_that_a_weight_is_no_longer_kept(kept, quantized, monkeypatch):
    monkeypatch.setattr(steps, "has_graphs", lambda device: True)
    monkeypatch.setattr(steps, "backend", TracedGraphs)
    model, answer, layers = quantized
    with torch.no_grad():
        expected = answer()
        report = ptq4dm.optimize(model, fused=False, compiled=False, weight_cache="1GB")
        for _ in range(3):
            assert torch.allclose(answer(), expected, atol=1e-5)
        assert report.models[""].graphed.replays == 2
        layer = next(iter(layers.values()))
        layer.wscales.mul_(2)
        changed = answer()
        assert not torch.allclose(changed, expected, atol=1e-5) and layer.eight_bits()[0] is None
        for _ in range(4):
            assert torch.allclose(answer(), changed, atol=1e-5)
        assert report.models[""].graphed.captures == 2


def test_a_copy_and_a_file_hold_none(kept, quantized):
    model, _, layers = quantized
    before = set(model.state_dict())
    ptq4dm.optimize(model, fused=False, compiled=False, weight_cache="1GB")
    assert set(model.state_dict()) == before
    copied = copy.deepcopy(model)
    assert kept_in(layers) and not kept_in(layers_of(copied))
    assert isinstance(model.forward, Refreshed) and not isinstance(copied.forward, Refreshed)
    ptq4dm.unoptimize(model)


def test_where_nothing_unpacks_it_is_said(quantized):
    model, _, layers = quantized
    report = ptq4dm.optimize(model, compiled=False, weight_cache="1GB")
    assert "weight_cache: left, for no layer unpacks a weight to 8 bits in its calls" in str(report)
    assert not kept_in(layers)


def test_compiled_blocks_take_at_most_two_forms(kept, quantized, monkeypatch):
    """Kept or not is known when code is made; of blocks one kind of layer at most differs."""
    model, answer, layers = quantized
    forms = []

    def backend(graph, inputs):
        forms.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(steps, "compile_blocks", lambda blocks: compile_blocks(blocks, backend=backend))
    with torch.no_grad():
        expected = answer()
        sizes = sorted({size_of(one) for one in layers.values()})
        ptq4dm.optimize(model, fused=False, compiled=True, graphs=False, weight_cache=sizes[0])
        assert len(kept_in(layers)) == 1 and torch.allclose(answer(), expected, atol=1e-5)
        assert len(forms) == 2
    ptq4dm.unoptimize(model)
