"""The slot of rounders: every member, on every grid."""

import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.formats.fp8 import scale_of
from ptq4dm.kernels.formats.grid import Fp8Grid, Grid
from ptq4dm.kernels.formats.power import PowerGrid, raised
from ptq4dm.ranges.weights import weight_grid
from ptq4dm.rounding import ROUNDERS

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(outputs=12, inputs=96):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)[:, None]
    return weight, LayerEvidence(torch.randn(600, inputs, generator=generator) @ mixing)


def rows_mixed(weight, affine=False):
    """Rows of 8 bits among those of 4."""
    half, whole = weight_grid(weight, 4, affine=affine), weight_grid(weight, 8, affine=affine)
    wide = (torch.arange(len(weight)) % 3 == 1)[:, None]
    picked = lambda a, b: torch.where(wide, torch.as_tensor(b), torch.as_tensor(a))  # noqa: E731
    zeros = picked(half.zeros, whole.zeros) if affine else None
    return Grid(picked(half.scales, whole.scales), zeros, picked(half.low, whole.low), picked(half.high, whole.high))


def grids(weight):
    return {
        "int8": weight_grid(weight, 8),
        "int4-row": weight_grid(weight, 4),
        "int4-groups": weight_grid(weight, 4, group_size=32),
        "int4-affine": weight_grid(weight, 4, group_size=32, affine=True),
        "power": PowerGrid.over(weight_grid(raised(weight, 0.7), 4), 0.7),
        "rows-mixed": rows_mixed(weight),
        "rows-mixed-affine": rows_mixed(weight, affine=True),
        "fp8": Fp8Grid(scale_of(weight, (1,))),
    }


GRIDS = list(grids(problem()[0]))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("rounding", ROUNDERS)
def test_codes_are_on_the_grid_and_keep_their_values(rounding, name):
    weight, evidence = problem()
    grid = grids(weight)[name]
    if grid.kind not in ROUNDERS[rounding].grids:
        return  # plans that ask for it are refused
    codes = ROUNDERS[rounding](weight, grid, evidence)
    values = grid.values(codes)
    assert codes.shape == weight.shape and values.isfinite().all()
    assert torch.equal(grid.codes(values), codes)
    if isinstance(grid, (Grid, PowerGrid)):
        assert codes.dtype == torch.int8 and (grid.low <= codes).all() and (codes <= grid.high).all()


@pytest.mark.parametrize("name", GRIDS)
def test_hessian_rounding_gains_on_every_grid(name):
    weight, evidence = problem()
    grid = grids(weight)[name]
    errors = {
        rounding: (evidence.rows @ (weight - grid.values(ROUNDERS[rounding](weight, grid, evidence))).T).norm()
        for rounding in ("nearest", "gptq")
    }
    assert errors["gptq"] < 0.7 * errors["nearest"]


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "fp8"])
def test_learned_rounding_gains_and_repeats_itself(name):
    weight, evidence = problem()
    grid = grids(weight)[name]
    codes = ROUNDERS["learned"](weight, grid, evidence)

    def error(found):
        return float((evidence.rows @ (weight - grid.values(found)).T).norm())

    nearest = ROUNDERS["nearest"](weight, grid)
    assert error(codes) < 0.75 * error(nearest)
    assert error(codes) <= error(ROUNDERS["gptq"](weight, grid, evidence)) * (1 + 1e-6)
    torch.rand(5)  # whoever draws from the global generator is found out
    assert torch.equal(codes, ROUNDERS["learned"](weight, grid, evidence))
    moved = (codes.float() - nearest.float()).abs()
    assert 0 < (moved > 0).float().mean() < 0.6


def test_a_grid_picks_columns():
    weight, _ = problem()
    for name, grid in grids(weight).items():
        order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
        picked = grid.columns(order)
        whole = grid.values(grid.codes(weight))[:, order]
        found = torch.stack([picked.nearest(weight[:, order][:, j], j) for j in range(96)], 1)
        assert torch.equal(found, whole), name


def test_grids_of_outputs_are_parts_of_the_whole():
    """Picked and put together again, also where each output has ends of its own."""
    weight, _ = problem()
    for name, grid in grids(weight).items():
        whole = type(grid).stacked([grid.rows(slice(0, 5)), grid.rows(slice(5, 12))])
        assert torch.equal(whole.codes(weight), grid.codes(weight)), name
        if isinstance(grid, Grid):
            low, high = grid.ends(96)
            steps = grid.steps(weight).round()
            assert torch.equal(grid.values(grid.codes(weight)), steps.clamp(low, high) * grid._wide(grid.scales, 96))


def test_an_unknown_rounder_is_named():
    with pytest.raises(UserError, match="rounding 'down' is unknown; choose from .*nearest"):
        ROUNDERS.find("down")
