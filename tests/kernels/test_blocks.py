"""Weights in blocks: packing, the formula in float64, the op, its Triton kernel, and layers around them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import normal
from ptq4dm.errors import UserError
from ptq4dm.kernels import dispatch
from ptq4dm.kernels.blocks.layer import FLOATS, blocks_linear, weight_of
from ptq4dm.kernels.formats import blocks
from ptq4dm.layers.blocks.layer import BlocksLinear, BlocksPlan
from ptq4dm.layers.choices import check_choices, check_fit
from ptq4dm.layers.registry import empty_quantized

kernel = pytest.importorskip("ptq4dm.kernels.blocks.floats_triton", reason="needs Triton", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] * torch.cuda.is_available()
CASES = {  # bits, rows, inputs, groups, zero, offsets
    "Q8_0": (8, 70, 192, 6, 0, False),
    "Q4_0": (4, 5, 1056, 33, 8, False),
    "Q4_K": (4, 13, 768, 24, 0, True),
    "Q6_K": (8, 3, 512, 32, 0, False),
    "a row": (8, 9, 130, 1, 0, True),
}


def case(name):
    """(codes, as they are stored, scales, offsets, zero)."""
    bits, n, k, groups, zero, offsets = CASES[name]
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(0 if bits == 4 else -128, 16 if bits == 4 else 128, (n, k), generator=draw).to(torch.int8)
    scales = normal(n, groups, seed=2).abs() + 0.01
    return (
        codes,
        blocks.pack(codes) if bits == 4 else codes,
        scales,
        normal(n, groups, seed=3) if offsets else None,
        zero,
    )


def exact(codes, scales, offsets, zero):
    """w [N, K] float64."""
    w = (codes.double() - zero).unflatten(1, (scales.shape[1], -1)) * scales.double()[:, :, None]
    return (w if offsets is None else w + offsets.double()[:, :, None]).flatten(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_formula(name, dtype):
    codes, stored, scales, offsets, zero = case(name)
    right = exact(codes, scales, offsets, zero)
    operands = [None if one is None else one.to(DEVICE) for one in (stored, scales, offsets)]
    got = kernel.floats(*operands, zero, codes.shape[1], dtype).cpu()
    step = torch.finfo(dtype).eps if dtype != torch.float32 else 4 * torch.finfo(dtype).eps
    room = right.abs() + (0 if offsets is None else (right.abs() + offsets.abs().max()))
    assert got.dtype == dtype and got.any() and ((got.double() - right).abs() <= step * room).all()
    assert torch.allclose(weight_of(stored, scales, offsets, zero).double(), right, rtol=1e-5, atol=1e-4)


def test_codes_of_4_bits_are_packed_as_files_have_them():
    codes = torch.arange(64).view(1, 64).remainder(16).to(torch.int8)
    packed = blocks.pack(codes)
    assert packed[0, 0] == 0 and packed[0, 1] == 1 + 16 and packed.shape == (1, 32)
    assert packed[0, 5] == codes[0, 5] + 16 * codes[0, 21] and torch.equal(blocks.unpack(packed), codes)


def test_outer_scales_are_spread_over_their_blocks():
    inner, outer = torch.tensor([[1, 2, 3, 4]]).char(), torch.tensor([[0.5, 2.0]]).half()
    assert blocks.spread(inner, outer).tolist() == [[0.5, 1.0, 6.0, 8.0]]
    assert blocks.spread(outer, None).dtype == torch.float32


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_op_multiplies(name, dtype):
    codes, stored, scales, offsets, zero = case(name)
    weight, bias = exact(codes, scales, offsets, zero), normal(len(codes), seed=5)
    x = normal(2, 3, codes.shape[1], seed=4).to(dtype)
    operands = [None if one is None else one.to(DEVICE) for one in (x, stored, scales, offsets)]
    y = blocks_linear(*operands, zero, bias.to(DEVICE)).cpu()
    right = F.linear(x.double(), weight, bias.double())
    assert y.dtype == dtype and y.shape == right.shape
    assert ((y.double() - right).norm() / right.norm()) < (1e-5 if dtype in (torch.float32, torch.float64) else 1e-2)
    assert blocks_linear(operands[0][:0], *operands[1:], zero, None).shape == (0, 3, len(codes))


def test_the_op_checks_and_has_a_fake():
    _, stored, scales, offsets, zero = case("Q4_K")
    x = normal(4, 768)
    arguments = tuple(None if one is None else one.to(DEVICE) for one in (x, stored, scales, offsets))
    torch.library.opcheck(torch.ops.ptq4dm.blocks_linear.default, (*arguments, zero, None))
    with pytest.raises(ValueError, match="are not of 256 inputs"):
        blocks_linear(arguments[0][:, :256], *arguments[1:], zero, None)


def test_layers_say_what_they_are():
    plan = BlocksPlan(codes="e4m3", size=None)
    layer = empty_quantized(nn.Linear(6, 4), plan, DEVICE)
    values = normal(4, 6).to(torch.float8_e4m3fn)
    layer.put(qweight=values.to(DEVICE), wscales=torch.full((4, 1), 0.5, device=DEVICE))
    layer.put(bias=torch.zeros(4, device=DEVICE))
    assert torch.equal(layer.half().dequantized_weight().cpu(), values.float() / 2) and isinstance(
        layer, BlocksLinear
    )
    assert layer.wscales.dtype == torch.float32 and str(plan) == "FP8 A16 blocks"
    assert layer.kernel_name() == (dispatch.CUBLAS if DEVICE == "cuda" else "reference")
    x = normal(3, 6).half().to(DEVICE)
    right = F.linear(x.float(), layer.dequantized_weight())
    assert torch.allclose(layer(x).float(), right, atol=1e-2)
    with pytest.raises(UserError, match="cannot be made anew"):
        layer.pack(values.float(), "layer")
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": "int5"}, "codes are int4, int8, e4m3, not int5"),
        ({"size": 0}, "size is 0 and counts from 1"),
        ({"zero": 8}, "zero is 8, which is no code of int8"),
        ({"nested": -1}, "nested is -1"),
        ({"nested": 2, "size": None}, "nested is 2 and counts blocks of a size"),
        ({"size": 48}, "128 inputs do not divide into groups of 48"),
        ({"nested": 8}, "128 inputs do not divide into groups of 256"),
        ({"codes": "int4", "size": 8}, ""),
    ],
)
def test_choices_are_checked(options, message):
    def check():
        check_choices("layer", BlocksPlan(**options))
        check_fit("layer", BlocksPlan(**options), nn.Linear(128, 4))

    if not message:
        return check()
    with pytest.raises(UserError, match=message):
        check()
