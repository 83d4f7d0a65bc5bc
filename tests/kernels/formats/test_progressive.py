"""The progressive format: all its steps, zero points and codes stay in int8; what a range of 120 would do."""

import pytest
import torch

from ptq4dm.kernels.formats import progressive
from ptq4dm.kernels.formats.int4 import pack_int4, unpack_int4
from ptq4dm.kernels.formats.progressive import (
    LIMIT,
    MOST,
    ProgressiveGrid,
    first_scales,
    leaves_int8,
    operand,
    whole_steps,
    zero_points,
)

CODES = torch.arange(-8, 8).float()


def reachable(limit):
    """(low, high [R], w8 [R, 2 limit + 1], its mask): every range that reaches to zero, and every weight in it."""
    ends = torch.arange(limit + 1).float()
    low, high = (part.flatten() for part in torch.meshgrid(-ends, ends, indexing="ij"))
    w8 = torch.arange(-limit, limit + 1).float().expand(len(low), -1)
    return low, high, w8, (w8 >= low[:, None]) & (w8 <= high[:, None])


def by_paper(low, high):
    """(s1, z) as the paper has them: no zero point is moved."""
    steps = whole_steps((high - low) / 15)
    return steps, (-low / steps).round().clamp(0, 15) - 8


def stands_for(w8, steps, zeros):
    """The value of the nearest code of each w8, before it is an int8."""
    codes = ((w8 / steps[:, None]).round() + zeros[:, None]).clamp(-8, 7)
    return (codes - zeros[:, None]) * steps[:, None]


def test_no_nearest_code_leaves_int8():
    low, high, w8, inside = reachable(LIMIT)
    values = stands_for(w8, *by_paper(low, high))[inside]
    assert len(values) == 120 * 120 * 120 and values.min() >= -128 and values.max() <= 127
    low, high, w8, inside = reachable(LIMIT + 1)
    values = stands_for(w8, *by_paper(low, high))[inside]
    assert values.max() == 128, "a range of 120 has a code that int8 does not"


def test_moved_zero_points_keep_every_code_in_int8_and_every_nearest_value():
    low, high, w8, inside = reachable(LIMIT)
    steps, zeros = by_paper(low, high)
    found = zero_points(low, steps)
    assert torch.equal(found, found.round()) and found.min() >= -8 and found.max() <= 7
    moved = found != zeros
    assert 0 < moved.sum() < 100 and (found - zeros).abs().max() == 1
    every = (CODES - found[:, None]) * steps[:, None]
    assert every.min() >= -128 and every.max() <= 127
    assert not leaves_int8(steps.to(torch.int8), found.to(torch.int8)).any()
    assert leaves_int8(steps[moved].to(torch.int8), zeros[moved].to(torch.int8)).all()
    assert torch.equal(stands_for(w8, steps, found)[inside], stands_for(w8, steps, zeros)[inside])


def test_smaller_steps_keep_int8_too():
    """What clips a range leaves its zero point, and takes any smaller step."""
    low, high, *_ = reachable(LIMIT)
    full = whole_steps((high - low) / 15)
    zeros = zero_points(low, full).to(torch.int8)
    for step in range(1, MOST + 1):
        smaller = full.clamp(max=step).to(torch.int8)
        assert not leaves_int8(smaller, zeros).any()


def test_operands_are_exact():
    """All 16 codes of all groups that can be stored: int8 arithmetic gives what whole numbers do."""
    steps, zeros = torch.meshgrid(torch.arange(1, MOST + 1), torch.arange(-8, 8), indexing="ij")
    steps, zeros = (part.flatten()[:, None].to(torch.int8) for part in (steps, zeros))
    fits = ~leaves_int8(steps, zeros)[:, 0]
    codes = CODES.to(torch.int8).expand(len(steps), -1)
    codes = unpack_int4(pack_int4(codes, 16), 16)
    expected = (codes.long() - zeros.long()) * steps.long()
    assert fits.sum() > 100 and torch.equal(operand(codes, steps, zeros)[fits].long(), expected[fits])
    assert not torch.equal(operand(codes, steps, zeros).long(), expected), "the others leave int8"


def test_first_scales():
    weight = torch.tensor([[0.0, -2.38], [1.19, 0.5], [0.0, 0.0]])
    scales = first_scales(weight)
    assert scales.dtype == torch.bfloat16
    assert torch.allclose(scales.float(), torch.tensor([[0.02], [0.01], [1.0]]), rtol=2**-8)


def test_no_row_has_a_code_beyond_the_limit():
    """s0 in bfloat16 is off by 2^-9 at most, which does not move the largest weight to another whole number."""
    weight = torch.rand(10000, 1) * torch.logspace(-30, 30, 10000)[:, None]
    assert torch.equal((weight / first_scales(weight).float()).round().unique(), torch.tensor([float(LIMIT)]))


def grid(groups=2):
    channel, steps = (torch.rand(3, 1) + 0.5).bfloat16(), torch.randint(1, 9, (3, groups)).float()
    return ProgressiveGrid.over(channel, steps, torch.full_like(steps, -1))


def test_a_grid_is_its_operand_times_the_scales_of_its_rows():
    torch.manual_seed(0)
    one = grid()
    codes = torch.randint(-8, 8, (3, 8), dtype=torch.int8)
    whole = operand(codes, one.whole.to(torch.int8), one.zeros.to(torch.int8))
    assert torch.equal(one.values(codes), whole.float() * one.channel.float())
    assert torch.equal(one.codes(one.values(codes)), codes)
    both = ProgressiveGrid.stacked([one, one])
    assert torch.equal(both.values(torch.cat([codes, codes])), one.values(codes).repeat(2, 1))


def test_scales_cannot_be_others():
    one = grid()
    assert one.with_scales(one.scales.clone()) is one
    with pytest.raises(ValueError, match="whole steps"):
        one.with_scales(one.scales * 1.01)
    assert progressive.LIMIT == 119
