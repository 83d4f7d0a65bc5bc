"""Range objectives against brute force on the values themselves."""

import itertools

import pytest
import torch

from helpers import correlated
from ptq4dm.calibration.input_statistics import InputStatistics
from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.formats.int8 import (
    affine_grids,
    affine_parameters,
    dequantize_weight,
    quantize_weight,
    weight_limit,
)
from ptq4dm.ranges.inputs import activation_grid
from ptq4dm.ranges.registry import OBJECTIVES, objective_parameter
from ptq4dm.ranges.weights import weight_grid, weight_scale

ALONE = [name for name, one in OBJECTIVES.items() if not one.needs]  # those that look at the values alone


def heavy_tailed(*shape, seed=0):
    """Student's t with 3 degrees of freedom: a bulk of unit size and a few values that are many times as large."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    return normal / torch.randn(3, *shape, generator=generator).square().mean(0).sqrt()


def weight_errors(weight, scale, bits, exponent):
    """[N] sums of |w - Q(w)|^p, in float64."""
    back = dequantize_weight(quantize_weight(weight, scale, bits), scale)
    return (weight.double() - back.double()).abs().pow(exponent).sum(1)


def grid_error(values, scale, zero, bits, exponent):
    values, limit = values.double(), 2 ** (bits - 1)
    codes = (torch.round(values / scale) + zero).clamp(-limit, limit - 1)
    return float((values - (codes - zero) * scale).abs().pow(exponent).mean())


def measured(values):
    """(histogram, limit, low, high) as calibration gives them."""
    statistics = InputStatistics(1, 1)
    statistics.update(0, 0, values)
    return statistics.merged(0)


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("objective, exponent", [("mse", 2.0), ("lp", 2.4), ("lp", 1.0)])
def test_weight_search_is_never_worse_than_max_and_near_the_best(objective, exponent, bits):
    weight = heavy_tailed(12, 300)
    found = weight_scale(weight, bits, objective, exponent)
    full = weight_scale(weight, bits, "max")
    errors = weight_errors(weight, found, bits, exponent)
    at_max = weight_errors(weight, full, bits, exponent)
    assert (errors <= at_max * (1 + 1e-5)).all()
    fine = torch.stack([weight_errors(weight, full * f, bits, exponent) for f in torch.linspace(0.5, 1, 401)])
    assert (errors <= 1.1 * fine.min(0).values).all() and errors.sum() <= 1.03 * fine.min(0).values.sum()
    if bits <= 4:
        assert errors.sum() < 0.9 * at_max.sum()  # clipping pays on such tails


def test_weight_rows_are_independent():
    weight = heavy_tailed(5, 64)
    for objective in ALONE:
        together = weight_scale(weight, 4, objective)
        alone = torch.cat([weight_scale(row[None], 4, objective) for row in weight])
        assert torch.equal(together, alone)


def test_max_puts_the_largest_value_on_the_last_code():
    weight = heavy_tailed(4, 2, 3, 3)
    for bits in (8, 4):
        codes = quantize_weight(weight, weight_scale(weight, bits), bits)
        assert (codes.flatten(1).abs().amax(1) == weight_limit(bits)).all()


def test_weight_percentile_clips():
    weight = torch.arange(1, 1001).float()[None] * torch.tensor([[1.0], [-2.0]])
    scale = weight_scale(weight, 8, "percentile", 90.0)
    assert torch.allclose(scale * 127, torch.tensor([900.1, 1800.2]), atol=0.01)
    assert torch.equal(weight_scale(weight, 8, "percentile", 100.0), weight_scale(weight, 8, "max"))


def test_weight_percentile_of_a_large_matrix():
    weight = torch.zeros(2, 2**23 + 8)  # more than torch.quantile used to take in one call
    weight[0], weight[1, :10] = 3.0, torch.arange(1.0, 11.0)
    scale = weight_scale(weight, 8, "percentile")
    assert torch.allclose(scale, torch.tensor([3.0, 10.0]) / 127)  # nearly all zeros: the percentile is no range


@pytest.mark.parametrize("objective", ALONE)
def test_zero_and_constant_rows(objective):
    weight = torch.zeros(4, 9)
    weight[1], weight[2, 3], weight[3] = 0.5, -1e-3, 1e-42
    scale = weight_scale(weight, 8, objective)
    assert scale[0] == 1 and (scale > 0).all() and scale.isfinite().all() and scale.dtype == torch.float32
    back = dequantize_weight(quantize_weight(weight, scale), scale)
    assert (back[0] == 0).all() and torch.allclose(back[1], weight[1], rtol=0.01)


# --- activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("objective, exponent", [("mse", 2.0), ("lp", 2.4)])
@pytest.mark.parametrize("shape", ["both tails", "one tail", "positive"])
def test_activation_search_against_brute_force(shape, objective, exponent, bits, symmetric):
    values = heavy_tailed(20_000)
    if shape == "one tail":
        values = torch.nn.functional.silu(values)
    if shape == "positive":
        values = values.abs()
    histogram, limit, low, high = measured(values)
    found = activation_grid(histogram, limit, low, high, bits, objective, exponent, symmetric)
    error = grid_error(values, *found, bits, exponent)
    at_max = grid_error(values, *affine_parameters(low, high, bits, symmetric), bits, exponent)
    assert error <= at_max * 1.001  # not worse by more than the histogram's bins blur
    assert not symmetric or found[1] == 0
    if bits <= 4:
        assert error < 0.8 * at_max
    fractions = torch.linspace(0, 1, 25)[1:].tolist()
    bound = max(-low, high)
    ends = (
        [(-bound * f, bound * f) for f in fractions]
        if symmetric
        else [(low * a, high * b) for a in (fractions if shape == "both tails" else [1.0]) for b in fractions]
    )
    best = min(grid_error(values, *affine_parameters(a, b, bits, symmetric), bits, exponent) for a, b in ends)
    assert error <= 1.05 * best


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_grids_of_many_ranges_are_those_of_each(bits, symmetric):
    """The formula one range after the other, in Python's float64: the same scales and zero points to the bit."""
    lows = [0.0, -1.5, -0.7, -3e4, 0.2, -1e-44, -1.0]
    highs = [0.3, 1e-9, 2.3, 1e-3, 5.0, 0.0, 1.0]
    scales, zeros = affine_grids(torch.tensor(lows).double(), torch.tensor(highs).double(), bits, symmetric)
    for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
        low, high = (float(torch.tensor(end)) for end in (min(low, 0.0), max(high, 0.0)))
        wide = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
        scale = torch.tensor(wide, dtype=torch.float32).item()
        zero = 0 if symmetric else round(-low / scale) - 2 ** (bits - 1) if scale > 1e-37 else 0
        assert (scales[number], zeros[number]) == ((scale, zero) if scale > 1e-37 else (1.0, 0))


def test_max_is_exact_and_contains_zero():
    values = torch.linspace(2.0, 5.0, 100)
    assert activation_grid(*measured(values), 8) == affine_parameters(0.0, 5.0, 8)
    scale, zero = activation_grid(*measured(-values), 8)
    assert (127 - zero) * scale == 0 and (-128 - zero) * scale == pytest.approx(-5)


def test_activation_percentile_clips():
    values = torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([50.0])])
    for symmetric in (False, True):
        scale, zero = activation_grid(*measured(values), 8, "percentile", 99.9, symmetric)
        assert (127 - zero) * scale == pytest.approx(1, abs=0.05)
        assert (-128 - zero) * scale == pytest.approx(-1, abs=0.05)
    full = activation_grid(*measured(values), 8, "percentile", 100.0)
    assert (127 - full[1]) * full[0] == pytest.approx(50, rel=0.01)


@pytest.mark.parametrize("objective", ALONE)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_and_tiny_activations(objective, symmetric):
    assert activation_grid(*measured(torch.zeros(50)), 8, objective, None, symmetric) == (1.0, 0)
    scale, zero = activation_grid(*measured(torch.full((50,), 1e-42)), 8, objective, None, symmetric)
    assert scale == 1.0 and zero == 0
    scale, zero = activation_grid(*measured(torch.full((50,), 1e-30)), 8, objective, None, symmetric)
    assert 0 < scale < 1e-31 and -128 <= zero <= 127


# --- parameters ---------------------------------------------------------------------------------------------


def test_objective_parameters():
    assert objective_parameter("lp") == 2.4 and objective_parameter("lp", 3) == 3.0
    assert objective_parameter("mse", 7) == 2.0 and objective_parameter("max", 7) is None
    assert objective_parameter("percentile") == 99.99
    for wrong in [("best", None), ("lp", -1), ("lp", float("inf")), ("percentile", 100.1)]:
        with pytest.raises(UserError):
            objective_parameter(*wrong)


def test_clipping_by_the_output_is_checked_by_all_groups_together():
    """MixLLM's search: 0.80, 0.82 .. 1 of each group; where errors of groups add up to more, no clipping at all."""
    kept = 0
    for seed, bits in itertools.product(range(6), (4, 8)):
        fed = LayerEvidence(correlated(512, 96, seed=seed))
        weight = (
            heavy_tailed(2, 96, seed=seed)
            if bits == 4
            else torch.rand(2, 96, generator=torch.Generator().manual_seed(seed)) - 0.5
        )
        error = {}
        for objective in ("max", "output-checked"):
            grid = weight_grid(weight, bits, objective, group_size=32, affine=True, evidence=fed)
            error[objective] = float((fed.rows @ (grid.values(grid.codes(weight)) - weight).T).square().sum())
            if objective == "max":
                full = grid.scales
        steps = (grid.scales / full - 0.8) / 0.02
        assert (steps - steps.round()).abs().max() < 1e-3 and steps.min() > -1e-3 and steps.max() < 10.001
        clipped = bool((steps < 9.9).any())
        assert error["output-checked"] < error["max"] if clipped else error["output-checked"] == error["max"]
        kept += not clipped
    assert 0 < kept < 12
