"""Inputs in parts on a GPU's kernels: codes by the formula, and layers beside the same layer on a CPU."""

import pytest
import torch
from torch import nn

from helpers import distance, normal
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.kernels.w8a8 import parts
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.split.formats import split_plan

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # the kernels themselves run: compiled, or in Triton's interpreter
pytestmark = [pytest.mark.gpu] if CUDA else []


@pytest.fixture
def on_kernels(monkeypatch):
    monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.TRITON)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("channels, padding", [(3, (1, 1)), (40, (2, 0)), (64, (0, 0))])
def test_codes_are_the_formula_in_the_layout(channels, padding, bits, on_kernels):
    x = normal(2, channels, 5, 4)
    factors, offsets = torch.ones(channels), torch.zeros(channels)
    factors[channels // 3 :] = 5.5
    if padding == (0, 0):
        offsets[channels // 3 :] = -7
    scale, zero = torch.tensor(0.03), torch.tensor(-3, dtype=torch.int32)
    given = [one.to(DEVICE) for one in (x, factors, offsets, scale, zero)]
    codes = parts.w8a8_quantize_parts(*given, bits, padding).cpu()
    half, steps = 2 ** (bits - 1), x * factors[:, None, None] * (1 / scale)
    expected = (steps.round() - 3 + offsets[:, None, None]).clamp(-half, half - 1)
    (ph, pw), wide = padding, codes.shape[1]
    assert wide == -(-channels // 32) * 32
    room = torch.full((2, 5 + ph, 4 + pw, channels), -3.0)
    room[:, ph:, pw:] = expected.permute(0, 2, 3, 1)
    assert torch.equal(codes[: 2 * (5 + ph) * (4 + pw), :channels].float(), room.view(-1, channels))
    assert (codes[:, channels:] == -3).all()


LAYERS = {
    "linear": (lambda: nn.Linear(64, 40), (2, 5, 64), [0, 4]),
    "linear of 72 inputs": (lambda: nn.Linear(72, 11, bias=False), (7, 72), [0, -3]),
    "conv": (lambda: nn.Conv2d(40, 20, 3, padding=1), (2, 40, 5, 6), [0, 0]),
    "strided conv": (lambda: nn.Conv2d(40, 20, (3, 1), stride=2, dilation=(1, 2)), (2, 40, 7, 6), [0, 2]),
    "conv of one pixel": (lambda: nn.Conv2d(64, 130, 1, bias=False), (2, 64, 3, 3), [0, 5]),
    "nothing": (lambda: nn.Linear(64, 40), (0, 64), [0, 4]),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_what_they_give_on_a_cpu(name, bits, monkeypatch):
    torch.manual_seed(0)
    make, shape, offsets = LAYERS[name]
    layer, x = make(), normal(*shape)
    whole = LayerPlan(activation_bits=bits, input_scale=3.5 / 2 ** (bits - 1), input_zero_point=-1)
    quantized = quantized_copy(layer, split_plan(whole, [16], [1.0, 4.5], offsets), "layer")
    if x.numel():
        narrow = (..., slice(16, None)) if isinstance(layer, nn.Linear) else (slice(None), slice(16, None))
        x[narrow] /= 4.5
    expected = quantized(x)
    monkeypatch.setattr(w8a8, "kernel_name", lambda *_: w8a8.TRITON)
    found = quantized.to(DEVICE)(x.to(DEVICE)).cpu()
    assert found.shape == expected.shape and found.dtype == x.dtype
    if x.numel():
        assert distance(found, expected) < 1e-3 and distance(found, layer(x)) < (0.05 if bits == 8 else 0.4)
