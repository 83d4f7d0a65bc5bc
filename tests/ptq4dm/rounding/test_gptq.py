"""Hessian rounding: better than to nearest where inputs are correlated, and it ends whatever it is given."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import correlated, normal
from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.formats.grid import Grid
from ptq4dm.kernels.formats.int4 import dequantize_groups, quantize_groups
from ptq4dm.rounding import gptq

pytestmark = pytest.mark.usefixtures("one_thread")


def gptq_codes(weight, scales, inputs):
    """Codes in [-7, 7] by Hessian rounding."""
    return gptq.gptq(weight, Grid(scales, None, -7, 7), LayerEvidence(inputs))


def test_gptq_beats_rounding_to_nearest():
    weight, inputs = normal(24, 192), correlated(512, 192)  # more columns than one block
    nearest, scales = quantize_groups(weight, 64)
    codes = gptq_codes(weight, scales, inputs)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.abs().max() == 7
    errors = [(inputs @ (weight - dequantize_groups(c, scales)).T).norm() for c in (codes, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_gptq_does_not_depend_on_its_blocks(monkeypatch):
    weight, inputs = normal(5, 96), correlated(200, 96)
    _, scales = quantize_groups(weight, 32)
    found = []
    for block in (1, 7, 96):
        monkeypatch.setattr(gptq, "BLOCK", block)
        found.append(gptq_codes(weight, scales, inputs))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gptq_of_independent_inputs_is_rounding_to_nearest():
    weight = normal(6, 64)
    nearest, scales = quantize_groups(weight, 16)
    assert torch.equal(gptq_codes(weight, scales, torch.diag(normal(64).exp())), nearest)


def test_gptq_damps_a_singular_hessian_until_it_can(monkeypatch):
    inputs = torch.randint(-3, 4, (40, 16), generator=torch.Generator().manual_seed(0)).float()
    inputs[:, 5], inputs[:, 9] = inputs[:, 2], 0  # one column twice, one never fed
    tries, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h, **kw: tries.append(h) or cholesky(h, **kw))
    weight = normal(4, 16)
    nearest, scales = quantize_groups(weight, 16)
    codes = gptq_codes(weight, scales, inputs)
    errors = [(inputs @ (weight - dequantize_groups(c, scales)).T).norm() for c in (codes, nearest)]
    assert errors[0] < errors[1] and len(tries) == 2
    assert torch.equal(gptq_codes(weight, scales, torch.zeros(3, 16)), nearest)
    monkeypatch.setattr(gptq, "DAMPING", 1e-30)  # too little: it takes more
    tries.clear()
    codes = gptq_codes(weight, scales, inputs)
    assert len(tries) > 4 and codes.abs().max() == 7 and torch.equal(codes[:, 9], nearest[:, 9])


def test_gptq_of_broken_inputs_ends():
    with pytest.raises(UserError, match="NaN or infinity"):
        gptq_codes(normal(2, 16), torch.ones(2, 1), torch.full((4, 16), float("nan")))


class Launches(TorchDispatchMode):
    """Ops that compute or copy, and those that only look at a part of a tensor."""

    VIEWS = ("select", "slice", "unsqueeze", "unbind", "view", "diagonal", "t.default", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.computed = self.looked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = func.__name__.startswith(self.VIEWS)
        self.looked, self.computed = self.looked + view, self.computed + (not view)
        return func(*args, **(kwargs or {}))


def test_gptq_launches_few_kernels_for_a_column():
    """On a GPU its time is theirs: a model of 12 B has 1.5 million columns."""
    weight, inputs = normal(4, 256), correlated(300, 256)
    _, scales = quantize_groups(weight, 64)
    with Launches() as launches:
        gptq_codes(weight, scales, inputs)
    assert 256 < launches.computed < 8.5 * 256 and launches.looked < 4.5 * 256
