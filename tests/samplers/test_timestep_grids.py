"""The times at which the model is called."""

import diffusers
import numpy as np
import pytest
import torch
from scipy.stats import beta

from ptq4dm.errors import UserError
from ptq4dm.samplers import DEISScheduler
from ptq4dm.samplers.maths.grids import GRIDS, SPACINGS, make_grid
from ptq4dm.samplers.maths.schedule import ContinuousVP

STEPS = (1, 2, 3, 5, 7, 9, 10, 20, 50, 100, 250, 500, 700, 998, 999, 1000)
SMOOTH = [grid for grid in GRIDS if grid not in SPACINGS]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("offset", [0, 1])
def test_discrete_times_decrease_strictly_and_stay_in_the_schedule(schedule, grid, offset):
    scheduler = DEISScheduler(
        beta_schedule=schedule, timestep_grid=grid, steps_offset=offset, solver="ipndm", order=0
    )
    for steps in STEPS:
        times = make_grid(scheduler.schedule, grid, steps, offset)
        assert len(times) == steps + 1 and (times == times.round()).all()
        called = times[:-1]  # the model is not called at the last, where the last step ends
        assert (np.diff(called) < 0).all() and called[0] <= 999 and called[-1] >= times[-1] == 0
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.tolist() == make_grid(scheduler.schedule, grid, 7, offset)[:-1].tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_a_short_schedule_can_be_used_up(grid):
    scheduler = DEISScheduler(num_train_timesteps=12, timestep_grid=grid, order=0)
    for steps in range(1, 13):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps
        assert len(times) == steps and (times.diff() < 0).all() and times[0] <= 11 and times[-1] >= 0
    assert times.tolist() == list(range(11, -1, -1))


@pytest.mark.parametrize("grid", SMOOTH)
def test_continuous_times_are_even_in_what_the_grid_names(grid):
    schedule = ContinuousVP()
    times = make_grid(schedule, grid, 20)
    rho = schedule.rho(times)
    top, bottom = rho[0], rho[-1]
    even = {
        "linear": lambda: times,
        "quad": lambda: times ** (1 / 2),
        "cubic": lambda: times ** (1 / 3),
        "log": lambda: np.log(rho),
        "edm": lambda: rho ** (1 / 7),
        "beta": lambda: beta.cdf((rho - bottom) / (top - bottom), 0.6, 0.6),
    }[grid]()
    assert times[[0, -1]] == pytest.approx([1, 1e-3], rel=1e-14)
    assert np.allclose(np.diff(even), (even[-1] - even[0]) / 20, rtol=1e-6)


def test_a_continuous_schedule_has_room_for_any_number_of_steps():
    times = make_grid(ContinuousVP(), "quad", 3000)
    assert len(times) == 3001 and (np.diff(times) < 0).all()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 7, 20, 61])
@pytest.mark.parametrize("offset", [0, 1])
def test_spacings_are_those_of_diffusers(spacing, steps, offset):
    ours = DEISScheduler(timestep_grid=spacing, steps_offset=offset)
    theirs = diffusers.DEISMultistepScheduler(timestep_spacing=spacing, steps_offset=offset)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps[:steps])  # of trailing 61, diffusers has 62: a -1 at the end


@pytest.mark.parametrize(
    ("flag", "grid"), [("use_karras_sigmas", "edm"), ("use_exponential_sigmas", "log"), ("use_beta_sigmas", "beta")]
)
def test_diffusers_options_choose_a_grid(flag, grid):
    def times(**options):
        scheduler = DEISScheduler(solver="t_ab", **options)
        scheduler.set_timesteps(9)
        return scheduler.timesteps.tolist()

    assert times(**{flag: True}) == times(timestep_grid=grid) != times()
    assert times(**{flag: True}, timestep_grid="cubic") == times(timestep_grid="cubic")


def test_two_such_options_exclude_each_other():
    with pytest.raises(UserError, match="exclude each other"):
        DEISScheduler(use_karras_sigmas=True, use_beta_sigmas=True)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(UserError, match="must be 1 or more|more than the 1000 timesteps"):
        DEISScheduler().set_timesteps(steps)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_continuous_schedule_has_no_timesteps_to_count(spacing):
    scheduler = DEISScheduler(beta_schedule="continuous", beta_start=0.1, beta_end=20.0, timestep_grid=spacing)
    with pytest.raises(UserError, match="continuous"):
        scheduler.set_timesteps(5)


def test_unknown_grid():
    with pytest.raises(UserError, match="unknown timestep_grid 'square'; choose from .*linear, quad"):
        DEISScheduler(timestep_grid="square")
    with pytest.raises(UserError, match="unknown timestep_grid"):
        make_grid(ContinuousVP(), "square", 5)
