"""Codes in groups a power of two apart: bounds, both kinds of rounding, and shifted codes as operands."""

import pytest
import torch

from ptq4dm.kernels.formats import shift


def uneven(rows=6, pixels=5, columns=9, seed=0):
    """Values whose rows and columns differ by powers of two and more."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, pixels, columns, generator=g)
    return x * torch.logspace(-2, 0, rows)[:, None, None] * torch.logspace(-1, 1, columns)


@pytest.mark.parametrize("bits", range(2, 9))
def test_shifted_codes_fit_in_eight_bits(bits):
    groups = shift.groups_of(bits, 7)
    codes = shift.encode(uneven(), bits, groups)
    assert bits + groups <= 9 and codes.codes.dtype == torch.int8
    assert codes.codes.abs().max() == 2 ** (bits - 1) - 1  # the largest value takes the last code
    for shifted, exponents in (
        (shift.across_columns(codes), codes.columns),
        (shift.across_rows(codes), codes.rows[:, None, None]),
    ):
        wide = codes.codes.long() << (groups - 1 - exponents.long())
        assert shifted.dtype == torch.int8 and torch.equal(shifted.long(), wide)
        assert wide.abs().max() <= 127


def test_nearest_is_within_half_a_step_and_nothing_is_clipped():
    x, groups = uneven(), 4
    codes = shift.encode(x, 5, groups)
    steps = shift.row_steps(codes)[:, None, None] * shift.powers(-codes.columns)
    assert ((shift.decode(codes) - x).abs() <= steps / 2 * (1 + 1e-5)).all()
    # the steps are the smallest powers of two below the tensor's that clip nothing, rows first
    peaks = x.abs().amax((1, 2))
    assert torch.equal(codes.rows, torch.log2(peaks.max() / peaks).floor().clamp(0, groups - 1).to(torch.int8))
    scaled = (x.abs() * shift.powers(codes.rows)[:, None, None]).amax((0, 1))
    assert (scaled * shift.powers(codes.columns) <= peaks.max() * (1 + 1e-6)).all()


def test_stochastic_rounding_has_the_value_as_its_mean():
    x, draws = uneven(), 2000
    g = torch.Generator().manual_seed(1)
    total = torch.zeros_like(x, dtype=torch.float64)
    for _ in range(draws):
        codes = shift.encode(x, 4, 5, torch.rand(x.shape, generator=g))
        total += shift.decode(codes)
    steps = (shift.row_steps(codes)[:, None, None] * shift.powers(-codes.columns)).double()
    part = x / steps - (x / steps).floor()
    variance = part * (1 - part) * steps.square() / draws
    often = part * (1 - part) > 0.01  # elsewhere 2000 draws are no Gaussian sum
    z = ((total / draws - x) / variance.sqrt())[often]
    assert often.float().mean() > 0.8 and z.abs().max() < 4.5 and 0.8 < z.square().mean() < 1.25
    assert ((total / draws - x).abs() <= 0.05 * steps).all()
    again = shift.encode(x, 4, 5, torch.full_like(x, 0.25))
    assert torch.equal(again.codes, shift.encode(x, 4, 5, torch.full_like(x, 0.25)).codes)  # the noise alone decides


def test_one_group_is_one_step_for_the_tensor():
    codes = shift.encode(uneven(), 6, 1)
    assert not codes.rows.any() and not codes.columns.any() and shift.shift_step(1) == 1.0


def test_groups_have_a_smaller_error_than_one_step():
    x = uneven()
    errors = [(shift.decode(shift.encode(x, 4, groups)) - x).square().sum().item() for groups in (1, 2, 5)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.2 * errors[2]


def test_zeros_infinity_and_widths():
    empty = shift.encode(torch.zeros(2, 3, 4), 6, 3)
    assert not shift.decode(empty).any() and empty.scale == 1
    x = uneven()
    x[2, 1] = 0
    x[:, :, 3] = 0
    assert not shift.decode(shift.encode(x, 6, 3))[:, :, 3].any()
    x[0, 0, 0] = float("inf")
    assert not shift.encode(x, 6, 3).scale.isfinite()
    with pytest.raises(ValueError, match="codes of 6 bits have at most 3 groups, not 4"):
        shift.encode(x, 6, 4)


def test_bfloat16_is_rounded_as_its_value():
    x = uneven().bfloat16()
    one, other = shift.encode(x, 6, 3), shift.encode(x.float(), 6, 3)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
