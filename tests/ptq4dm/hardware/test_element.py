"""Shift-and-add products are the products, for every pair of operands; sums of groups stay below 2^22."""

import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.hardware import group_product, shift_add, shift_add_float
from ptq4dm.hardware.element import GROUP, MOST_SUM, partial_sums

EVERY_INT8 = torch.arange(-128, 128).to(torch.int8)[:, None]


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_all_products_of_int8_and_4_bits(signed):
    weights = torch.arange(-8, 8) if signed else torch.arange(16)
    found = shift_add(EVERY_INT8, weights, signed)
    assert found.shape == (256, 16) and found.dtype == torch.int32
    assert torch.equal(found.long(), EVERY_INT8.long() * weights)
    assert signed is (int(found.max()) == 1024)  # -128 * -8


def test_all_finite_float16_and_4_bits():
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()][:, None]
    assert len(x) == 2 * (1 << 15) - 2 * 1024 and bool((x.abs().float() == 2.0**-24).any())  # subnormal ones, too
    for signed, weights in ((True, torch.arange(-8, 8)), (False, torch.arange(16))):
        found = shift_add_float(x, weights, signed)
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), x.double() * weights)


@pytest.mark.parametrize("rows, columns, groups, group", [(3, 5, 2, 128), (2, 7, 3, 32), (1, 1, 1, 1)])
def test_a_group_is_dequantized_after_its_sum(rows, columns, groups, group):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-128, 128, (rows, groups * group), generator=generator).to(torch.int8)
    codes = torch.randint(0, 16, (columns, groups * group), generator=generator)
    zeros = torch.randint(0, 16, (columns, groups), generator=generator)
    scales, input_scale = torch.rand(columns, groups, generator=generator), torch.rand(rows, generator=generator)
    sums = partial_sums(x, codes, zeros, group)
    shifted = (codes - zeros.repeat_interleave(group, 1)).view(columns, groups, group)
    assert torch.equal(sums.long(), torch.einsum("mgk,ngk->mng", x.long().view(rows, groups, group), shifted))
    weight = (shifted * scales.double()[..., None]).flatten(1)
    wanted = input_scale.double()[:, None] * (x.double() @ weight.T)
    assert torch.allclose(group_product(x, codes, zeros, scales, input_scale, group), wanted, rtol=1e-12, atol=1e-9)


def test_the_largest_sum_of_a_group_is_below_the_bound():
    x = torch.full((1, GROUP), -128).to(torch.int8)
    codes = torch.stack([torch.full((GROUP,), 15), torch.zeros(GROUP, dtype=torch.long)])
    sums = partial_sums(x, codes, torch.tensor([[0], [15]]))
    assert sums.flatten().tolist() == [-128 * 15 * GROUP, 128 * 15 * GROUP]
    assert 128 * 15 * GROUP < MOST_SUM == 1 << 22


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: shift_add(torch.ones(2), torch.ones(2)), "int8 activations, not float32"),
        (lambda: shift_add(torch.ones(2, dtype=torch.int8), torch.tensor([8, 0])), "from -8 to 7"),
        (lambda: shift_add(torch.ones(2, dtype=torch.int8), torch.tensor([-1, 0]), signed=False), "from 0 to 15"),
        (lambda: shift_add(torch.ones(2, dtype=torch.int8), torch.tensor([0.5])), "whole number"),
        (lambda: shift_add_float(torch.ones(2), torch.tensor([1])), "float16 activations, not float32"),
        (lambda: shift_add_float(torch.tensor([torch.inf]).half(), torch.tensor([1])), "NaN or infinite"),
        (lambda: partial_sums(EVERY_INT8.T, torch.zeros(1, 256, dtype=int), torch.zeros(1, 1)), "do not fit"),
        (
            lambda: partial_sums(EVERY_INT8.T, torch.zeros(1, 256, dtype=int), torch.zeros(1, 1), 256),
            "1 to 128 inputs",
        ),
    ],
)
def test_wrong_operands_are_told(call, says):
    with pytest.raises(UserError, match=says):
        call()
