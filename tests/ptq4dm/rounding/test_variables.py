"""Variables of rounding: where they start, how far codes move, and that gradients reach what is trained."""

import pytest
import torch

from helpers import normal
from ptq4dm.kernels.formats.grid import Grid
from ptq4dm.ranges.weights import weight_grid
from ptq4dm.rounding.variables import VARIABLES, WIDE

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = list(VARIABLES)


def ends(low=-7.0, high=7.0, rows=6):
    return torch.full((rows, 1), low), torch.full((rows, 1), high)


def steps(rows=6, columns=40):
    """Places between codes; some beyond the grid's ends, some on codes."""
    found = normal(rows, columns, scale=4.0)
    found[:, 0], found[:, 1], found[:, 2] = 9.3, -8.6, 3.0
    return found


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_start_at_the_nearest_code(kind, wide):
    low, high = ends()
    variable = VARIABLES[kind](steps(), low, high, wide)
    nearest = steps().round().clamp(-7, 7)
    assert torch.equal(variable.hard(), nearest)
    soft = variable.soft()
    assert (soft - steps().clamp(-7, 7)).abs().max() <= 0.5 + 1e-5 and soft.isfinite().all()
    assert (soft - nearest).abs().max() <= (0.5 + 1e-5 if kind == "sigmoid" else 0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_move_as_far_as_they_may_and_no_further(kind, wide):
    low, high = ends()
    p, reach = steps().clamp(-7, 7), WIDE if wide else 0
    first, last = (p.floor() - reach).clamp(min=-7), (p.floor() + 1 + reach).clamp(max=7)
    least, most = torch.full_like(p, 99.0), torch.full_like(p, -99.0)
    for push in (-50.0, -1.5, -0.8, 0.0, 0.8, 1.5, 50.0):
        variable = VARIABLES[kind](steps(), low, high, wide)
        with torch.no_grad():
            variable.value.add_(push)
            variable.project()
        hard = variable.hard()
        assert torch.equal(hard, hard.round()) and (hard >= first).all() and (hard <= last).all()
        soft = variable.soft()
        assert (soft >= first).all() and (soft <= last).all()
        least, most = least.minimum(hard), most.maximum(hard)
    if kind == "division":  # a divisor moves a weight away from zero, and not across it
        assert torch.equal(most[p > 1], last[p > 1]) and torch.equal(least[p < -1], first[p < -1])
    else:
        assert torch.equal(least, first) and torch.equal(most, last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_the_variable_and_moves_codes_to_a_goal(kind):
    low, high = ends()
    p = steps()
    p[p.abs() < 1] += 2.5  # what lies near zero a divisor cannot move
    variable = VARIABLES[kind](p, low, high)
    goal = torch.where(normal(*p.shape, seed=4) < 0, variable.low, variable.high)
    optimizer = torch.optim.Adam([variable.value], 0.02)
    before = (variable.hard() != goal).float().mean()
    for _ in range(120):
        optimizer.zero_grad()
        (variable.soft() - goal).square().sum().backward()
        optimizer.step()
        variable.project()
    assert before > 0.3 and torch.equal(variable.hard(), goal)


@pytest.mark.parametrize("wide", [False, True])
def test_the_penalty_is_that_of_adaround(wide):
    low, high = ends(-50.0, 50.0)
    variable = VARIABLES["sigmoid"](steps(), low, high, wide)
    between = (variable.soft() - variable.soft().floor()).detach().double()
    for sharpness in (2.0, 20.0):
        expected = (1 - (2 * between - 1).abs() ** sharpness).mean()
        assert float(variable.penalty(sharpness).detach()) == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        variable.value.fill_(30.0)
    assert float(variable.penalty(2.0).detach()) == pytest.approx(0, abs=1e-6)  # whole numbers cost nothing
    assert [kind for kind in KINDS if VARIABLES[kind].driven] == ["sigmoid"]


@pytest.mark.parametrize("kind", KINDS)
def test_hard_codes_lie_on_a_grid_with_zero_points(kind):
    weight = normal(6, 64) + 0.7
    grid = weight_grid(weight, 3, group_size=32, affine=True)
    assert isinstance(grid, Grid) and grid.zeros is not None
    low, high = grid.ends(64)
    variable = VARIABLES[kind](grid.steps(weight), low, high)
    assert torch.equal((variable.hard() + (grid.low - low)).to(torch.int8), grid.codes(weight))
    with torch.no_grad():
        variable.value.add_(normal(6, 64, seed=2))
    codes = variable.hard() + (grid.low - low)
    assert torch.equal(codes, codes.round()) and codes.min() >= grid.low and codes.max() <= grid.high
