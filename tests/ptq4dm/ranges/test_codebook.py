"""Fits of codebooks: levels that were there are found, and known distributions get known errors."""

import pytest
import torch

import ptq4dm  # noqa: F401
from ptq4dm.evidence import LayerEvidence
from ptq4dm.ranges import codebook
from ptq4dm.ranges.codebook import codebook_grid
from ptq4dm.ranges.weights import weight_grid

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def error(grid, weight, share=1.0):
    return float(
        ((weight - grid.values(grid.codes(weight))).square() * share).sum() / (weight.square() * share).sum()
    )


def test_a_normal_weight_gets_the_error_of_lloyd_and_max():
    """0.009497 for 16 levels: Max 1960, table I."""
    weight = normal(8, 8192)
    assert error(codebook_grid(weight), weight) == pytest.approx(0.009497, rel=0.03)


@pytest.mark.parametrize("by_row", [False, True])
def test_levels_that_were_there_are_found(by_row):
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([-127, -90, -71, -55, -40, -27, -15, -4, 3, 14, 26, 39, 54, 70, 91, 127.0])
    scales = torch.rand(12, 2, 1, generator=generator) + 0.5
    weight = (levels[torch.randint(16, (12, 2, 64), generator=generator)] * scales).view(12, 128)
    assert error(codebook_grid(weight, 64, by_row), weight) < 0.3 * error(
        weight_grid(weight, 4, "mse", None, 64), weight
    )


@pytest.mark.parametrize("size", [None, 64])
def test_the_error_is_below_that_of_uniform_grids_of_the_same_bytes(size):
    tails = normal(48, 256).sign() * normal(48, 256, seed=1).abs() ** 1.5
    for weight in (normal(48, 256), tails):
        uniform = error(weight_grid(weight, 4, "mse", None, size), weight)
        whole, by_row = (error(codebook_grid(weight, size, each), weight) for each in (False, True))
        assert whole < 0.8 * uniform and by_row < whole


def test_more_rounds_gain_nothing(monkeypatch):
    weight = normal(24, 256)
    few = error(codebook_grid(weight, 64), weight)
    monkeypatch.setattr(codebook, "ROUNDS", 4 * codebook.ROUNDS)
    assert error(codebook_grid(weight, 64), weight) > 0.98 * few


def test_what_layers_are_fed_weighs_the_error():
    """Inputs of unlike size; under the sizes in another order the gain is gone."""
    mixed = torch.randperm(256, generator=torch.Generator().manual_seed(4))
    weight, size = normal(16, 256), torch.logspace(-1, 1, 256)[mixed]
    share = size.square()
    fed = [LayerEvidence(normal(512, 256, seed=2) * one) for one in (size, 1 / size)]
    plain, known, wrong = (error(codebook_grid(weight, 128, False, one), weight, share) for one in (None, *fed))
    assert known < 0.9 * plain < plain < wrong


def test_inputs_that_were_never_seen_count_as_equal():
    weight = normal(8, 64)
    found = codebook_grid(weight, None, False, LayerEvidence(torch.zeros(16, 64)))
    assert torch.equal(found.levels, codebook_grid(weight).levels)


@pytest.mark.parametrize("by_row", [False, True])
def test_groups_of_zeros_stay_zeros(by_row):
    weight = normal(8, 128)
    weight[2], weight[5, 64:] = 0, 0
    for size in (None, 64):
        grid = codebook_grid(weight, size, by_row)
        assert not grid.values(grid.codes(weight))[2].any() and grid.scales.gt(0).all()
    assert not grid.values(grid.codes(weight))[5, 64:].any()
    nothing = codebook_grid(torch.zeros(3, 64), None, by_row)
    assert not nothing.values(nothing.codes(torch.zeros(3, 64))).any()


def test_levels_use_int8_whole_and_rise():
    for by_row in (False, True):
        levels = codebook_grid(normal(6, 128), 32, by_row).levels
        assert levels.dtype == torch.int8 and levels.shape == (6 if by_row else 1, 16)
        assert (levels.int().abs().amax(1) == 127).all() and (levels.int().diff(dim=1) >= 0).all()


def test_sums_do_not_depend_on_their_order():
    values, slots = normal(5000) * torch.logspace(-3, 3, 5000), torch.arange(5000) % 7
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(3))
    found = codebook._sums(slots, values, 7)
    assert torch.equal(found, codebook._sums(slots[order], values[order], 7))
    exact = torch.stack([values[slots == i].double().sum() for i in range(7)])
    assert torch.allclose(found, exact, rtol=1e-9, atol=1e-9 * values.abs().max().item())
