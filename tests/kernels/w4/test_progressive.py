"""Progressive and grouped W4A8 products: the formulas, and the kernels against them."""

import pytest
import torch

import ptq4dm  # noqa: F401
from helpers import normal
from packed_layers import packed, progressive_weight, whole
from ptq4dm.kernels.w4 import grouped, progressive
from ptq4dm.kernels.w4.tokens import integer_product, token_codes


def test_sums_of_codes_are_exact_whatever_their_number():
    codes = torch.full((2, 5000), 127, dtype=torch.int8)
    weight = torch.full((3, 5000), -128, dtype=torch.int8)
    assert torch.equal(integer_product(codes, weight), torch.full((2, 3), -127.0 * 128 * 5000).double())


@pytest.mark.parametrize(("k", "groups"), [(384, 3), (384, 6), (384, 12), (200, 1), (384, 1)])
def test_progressive_codes_are_the_formula(k, groups):
    codes, steps, zeros = progressive_weight(9, k, groups)
    found = progressive.progressive_codes(packed(codes), steps, zeros, k)
    wide = (codes.view(9, groups, -1).int() - zeros[:, :, None].int()) * steps[:, :, None].int()
    assert found.dtype == torch.int8
    assert torch.equal(found.int(), wide.view(9, k))


def test_no_zero_points_are_zeros():
    codes, steps = whole(-7, 7, 5, 128), whole(1, 16, 5, 1)
    zeros = torch.zeros(5, 1, dtype=torch.int8)
    wanted = progressive.progressive_codes(packed(codes), steps, zeros, 128)
    assert torch.equal(progressive.progressive_codes(packed(codes), steps, None, 128), wanted)


def test_progressive_product_is_near_that_of_floats():
    codes, steps, zeros = progressive_weight(24, 384, 3)
    scales, bias, x = 0.01 + torch.rand(24, generator=torch.Generator().manual_seed(1)), normal(24), normal(2, 5, 384)
    y = progressive.progressive_linear(x, packed(codes), steps, zeros, scales, bias)
    weight = progressive.progressive_codes(packed(codes), steps, zeros, 384).double() * scales.double()[:, None]
    q, s = token_codes(x.view(10, 384))
    wanted = torch.nn.functional.linear(q.double() * s.double()[:, None], weight, bias.double())
    assert torch.allclose(y.view(10, 24).double(), wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("k", "groups"), [(384, 3), (384, 6), (384, 12), (200, 1)])
def test_grouped_product_is_that_of_the_floats_it_stands_for(k, groups, zeros):
    codes, wzeros = whole(-8, 7, 24, k), whole(-8, 7, 24, groups, seed=1) if zeros else None
    scales, bias, x = 0.01 + torch.rand(24, groups), normal(24), normal(10, k)
    y = grouped.grouped_linear(x, packed(codes), scales, wzeros, bias)
    steps = codes.view(24, groups, -1).double() - (wzeros[:, :, None].double() if zeros else 0)
    q, s = token_codes(x)
    weight = (steps * scales.double()[:, :, None]).view(24, k)
    wanted = torch.nn.functional.linear(q.double() * s.double()[:, None], weight, bias.double())
    assert torch.allclose(y.double(), wanted, rtol=1e-6, atol=1e-5)


def test_tokens_with_nan_have_no_outputs():
    codes, steps, zeros = progressive_weight(4, 128, 1)
    x = normal(3, 128)
    x[1, 7] = float("nan")
    y = progressive.progressive_linear(x, packed(codes), steps, zeros, torch.ones(4), None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_steps_in_floats_are_another_method():
    codes, steps, zeros = progressive_weight(4, 128, 1)
    with pytest.raises(ValueError, match="whole numbers in int8"):
        progressive.progressive_codes(packed(codes), steps.float(), zeros, 128)
    with pytest.raises(ValueError, match=r"\[N\] with N = 4"):
        progressive.progressive_linear(normal(1, 128), packed(codes), steps, zeros, torch.ones(3), None)
    with pytest.raises(ValueError, match="groups of 32, 64 or 128"):
        progressive.progressive_codes(packed(codes), steps.repeat(1, 8), zeros.repeat(1, 8), 128)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    """Shapes and types as torch.compile is told them; outputs are new tensors."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    codes, steps, zeros = progressive_weight(8, 256, 2)
    weight = [one.to(device) for one in (packed(codes), steps, zeros)]
    x, scales, bias = (normal(*size).to(device) for size in ((2, 3, 256), (8,), (8,)))
    torch.library.opcheck(torch.ops.ptq4dm.progressive_codes.default, (*weight, 256))
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (x.to(dtype), *weight, scales, bias)
        torch.library.opcheck(torch.ops.ptq4dm.progressive_linear.default, arguments)
        arguments = (x.to(dtype), weight[0], steps.float().to(device), None, None)
        torch.library.opcheck(torch.ops.ptq4dm.grouped_linear.default, arguments)
