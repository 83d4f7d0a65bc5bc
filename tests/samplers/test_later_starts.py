"""Image to image, and a base with a refiner: pipelines that sample a part of the timesteps."""

import warnings

import diffusers
import pytest

import analytic
from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler, choices

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
IMG2IMG = diffusers.StableDiffusionXLImg2ImgPipeline


class Pipe:
    """What diffusers' img2img pipelines read of themselves to cut the timesteps."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


def started(scheduler, strength, steps=20):
    scheduler.set_timesteps(steps)
    return IMG2IMG.get_timesteps(Pipe(scheduler), steps, strength, "cpu")[0]


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_strength_means_the_time_that_it_means_in_diffusers(strength):
    theirs = float(started(diffusers.DPMSolverMultistepScheduler(**SD), strength)[0])
    ours = {
        "ddim": DDIMScheduler(**SD, timestep_spacing="linspace"),
        "ipndm": DEISScheduler(**SD, solver="ipndm"),
        **{name: DEISScheduler(**SD, solver=name, timestep_grid="linear") for name in choices.DEFAULTS},
        **{grid: DEISScheduler(**SD, timestep_grid=grid) for grid in ("linspace", "leading", "trailing")},
    }
    for name, scheduler in ours.items():
        assert abs(float(started(scheduler, strength)[0]) - theirs) < 51, name  # less than a step of 1000 / 20


def test_where_it_means_another_time_a_warning_says_which_grid_to_take():
    for name in ("t_ab", "rho_ab", "log_rho", "rho_rk"):
        with pytest.warns(UserWarning, match="strength of 0.3, take timestep_grid='linear' to begin at 30%"):
            started(DEISScheduler(**SD, solver=name), 0.3)


def test_a_strength_too_small_for_one_step():
    for options in ({}, {"solver": "rho_rk"}):
        scheduler = DEISScheduler(**SD, **options)
        with pytest.raises(UserError, match=r"with 6 steps a strength must be 0.17 or more"):
            started(scheduler, 0.05, steps=6)
        assert len(started(scheduler, 0.17, steps=6)) == scheduler.order


def test_no_warning_where_diffusers_begins_there_too():
    for flag in ("use_karras_sigmas", "use_exponential_sigmas"):
        theirs = diffusers.DPMSolverMultistepScheduler(**SD, **{flag: True})
        same = diffusers.DEISMultistepScheduler(**SD, **{flag: True})
        expected = float(started(theirs, 0.5)[0])
        for ours in (DEISScheduler.from_config(theirs.config), DEISScheduler.from_config(same.config)):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                assert abs(float(started(ours, 0.5)[0]) - expected) < 60
        with pytest.warns(UserWarning, match="take timestep_grid='linear'"):
            started(DEISScheduler.from_config(theirs.config, timestep_grid="quad"), 0.3)


def test_ddim_says_the_same():
    with pytest.warns(UserWarning, match="grid 'quad'.*strength of 0.3, take timestep_grid='linear'"):
        started(DDIMScheduler(**SD, timestep_grid="quad"), 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for options in ({}, {"timestep_grid": "linear"}):
            assert len(started(DDIMScheduler(**SD, **options), 0.3)) == 6
    with pytest.raises(UserError, match=r"nothing is left to sample: with 6 steps a strength must be 0.17 or more"):
        started(DDIMScheduler(**SD), 0.05, steps=6)


def test_a_refiner_with_nothing_to_do_says_so():
    with pytest.raises(UserError, match="nothing is left to sample: .* a denoising_start must leave a timestep"):
        cut(DEISScheduler(**SD, solver="ipndm"), 0.999)


# ---- base and refiner


def cut(scheduler, fraction, steps=8):
    """The timesteps of an SDXL base up to denoising_end, and of its refiner from denoising_start on."""
    scheduler.set_timesteps(steps)
    limit = round(1000 - fraction * 1000)
    base = scheduler.timesteps[: int((scheduler.timesteps >= limit).sum())]
    return base, IMG2IMG.get_timesteps(Pipe(scheduler), steps, None, "cpu", denoising_start=fraction)[0]


def parted(options, fraction):
    problem, x = analytic.gaussian(), analytic.noise(8)
    base, refiner = DEISScheduler(**SD, **options), DEISScheduler(**SD, **options)
    alpha_bar = analytic.discrete_alpha_bar(base.schedule.alphas_cumprod)
    first, second = cut(base, fraction)[0], cut(refiner, fraction)[1]
    assert [*first.tolist(), *second.tolist()] == base.timesteps.tolist()
    for scheduler, times in ((base, first), (refiner, second)):
        for t in times:
            x = scheduler.step(problem.epsilon(x, alpha_bar(float(t))), t, x).prev_sample
    whole = analytic.solve(base, problem, alpha_bar, analytic.noise(8))
    return analytic.rms(x - whole)


@pytest.mark.filterwarnings("ignore:the timesteps of grid")
@pytest.mark.parametrize("method", ["3heun", "3ral"])
def test_a_runge_kutta_step_can_be_parted_where_the_sentence_says(method):
    options = {"solver": "rho_rk", "rk_method": method}
    for fraction in (0.35, 0.5, 0.8):
        try:
            difference = parted(options, fraction)
        except UserError as error:
            assert "is inside a Runge-Kutta step, where none can begin" in str(error)
            named = float(str(error).split("part at ")[1].split(",")[0])
            assert abs(named - fraction) < 0.2
            difference = parted(options, named)
        assert difference < 1e-12  # steps of Runge-Kutta remember nothing of those before


@pytest.mark.parametrize("method", ["2heun", "3kutta", "4rk"])
def test_steps_with_a_stage_at_their_end_cannot_be_parted_by_time(method):
    with pytest.raises(UserError, match="none can begin: take a solver with one evaluation a step"):
        cut(DEISScheduler(**SD, solver="rho_rk", rk_method=method), 0.8)


@pytest.mark.filterwarnings("ignore:the timesteps of grid")
@pytest.mark.parametrize("solver", ["t_ab", "ipndm", "rho_ab", "log_rho"])
def test_multistep_solvers_can_be_parted_anywhere(solver):
    for fraction in (0.35, 0.5, 0.8):
        assert parted({"solver": solver}, fraction) < 0.1  # the refiner begins without the base's memory
