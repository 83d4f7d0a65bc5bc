"""The reference of the 4-bit layer against its formula, one token and group at a time."""

import pytest
import torch
import torch.nn.functional as F

from helpers import normal
from ptq4dm.kernels.formats.int4 import pack_int4, quantize_groups
from ptq4dm.kernels.w4.reference import svdq_linear

pytestmark = pytest.mark.usefixtures("one_thread")


def rounded(x, activation, size, unsigned):
    """Activation rounding, one token and group at a time, in float64."""
    if activation == "none":
        return x
    result = x.clone()
    width = size if activation == "int4" else x.shape[-1]
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    e4m3 = e4m3[e4m3.isfinite()]
    for token in result.view(-1, x.shape[-1]):
        for group in token.split(width):
            if activation == "fp8":
                scale = group.abs().max() / 448
                group.copy_(e4m3[(group[:, None] / scale - e4m3).abs().argmin(1)] * scale)
            elif unsigned:
                group.copy_((group / (group.max() / 15)).round().clamp(0, 15) * (group.max() / 15))
            else:
                scale = group.abs().max() / (7 if activation == "int4" else 127)
                group.copy_((group / scale).round() * scale)
    return result


@pytest.mark.parametrize("n, k, size", [(1, 64, 64), (7, 192, 64), (33, 48, 16), (5, 384, 128)])
@pytest.mark.parametrize("activation, shift", [("int4", 0), ("int4", 0.171875), ("int8", 0), ("fp8", 0), ("none", 0)])
@pytest.mark.parametrize("parts", ["all", "no branch", "no smoothing", "no bias"])
def test_layer_is_the_formula(n, k, size, activation, shift, parts):
    x = F.gelu(2 * normal(2, 3, k)) if shift else normal(2, 3, k)
    codes, scales = quantize_groups(normal(n, k, seed=1), size, torch.float16)
    smooth = None if parts == "no smoothing" else normal(k, seed=2).exp()
    down, up = (None, None) if parts == "no branch" else (normal(3, k, seed=3), normal(n, 3, seed=4))
    bias = None if parts == "no bias" else normal(n, seed=5)
    y = svdq_linear(x, pack_int4(codes, size), scales, smooth, down, up, bias, activation, shift)

    inputs = (x.double() + shift) / (1 if smooth is None else smooth.double())
    weight = codes.double() * scales.double().repeat_interleave(size, 1)
    expected = rounded(inputs, activation, size, bool(shift)) @ weight.T
    if down is not None:
        expected += x.double() @ down.double().T @ up.double().T
    if bias is not None:
        expected += bias.double()
    assert y.dtype == x.dtype and y.shape == (2, 3, n)
    assert (y - expected).abs().max() < 2e-5 * expected.abs().max()


def test_layer_answers_in_the_dtype_of_its_input():
    codes, scales = quantize_groups(normal(8, 64), 64, torch.bfloat16)
    operands = (pack_int4(codes, 64), scales, None, None, None, None, "int4")
    x = normal(4, 64).bfloat16()
    y = svdq_linear(x, *operands)
    assert y.dtype == torch.bfloat16 and torch.equal(y, svdq_linear(x.float(), *operands).bfloat16())
