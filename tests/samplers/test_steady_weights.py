"""Steps whose weights cancel take a lower degree; errors of a model are then not blown up."""

import diffusers
import numpy as np
import pytest
import torch

import analytic
from ptq4dm.samplers import DEISScheduler, choices
from ptq4dm.samplers.maths.coefficients import steady

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    "ddpm": {},
    "sd": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}
FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def cancelling(scheduler):
    """The largest sum |w| / |sum w| of a step, with as much history as it takes."""
    return max(sum(map(abs, e.weights[-1])) / abs(sum(e.weights[-1])) for e in scheduler._evaluations)


def degrees(scheduler):
    return [len(e.weights) - 1 for e in scheduler._evaluations]


def generate(scheduler, steps, error, dtype=torch.float64):
    """From noise, with the exact model of N(0.5, 0.2^2) and white noise of deviation `error` on what it predicts."""
    scheduler.set_timesteps(steps)
    generator, bars = torch.Generator().manual_seed(0), scheduler.alphas_cumprod.double().numpy()
    x = torch.randn(4096, generator=generator, dtype=torch.float64).to(dtype)
    for t in scheduler.timesteps:
        a = float(np.interp(float(t), np.arange(1000), bars))
        y = scheduler.scale_model_input(x, t).double()
        x0 = 0.5 + a**0.5 * 0.04 * (y - a**0.5 * 0.5) / (a * 0.04 + 1 - a)
        output = (y - a**0.5 * x0) / max(1 - a, 1e-12) ** 0.5
        if scheduler.config.prediction_type == "v_prediction":
            output = a**0.5 * output - (1 - a) ** 0.5 * x0
        output = output + error * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = scheduler.step(output.to(dtype), t, x).prev_sample
    return x.double()


def test_steady_keeps_degrees_below_the_first_that_cancels():
    table = [[np.array([2.0])], [np.array([1.0]), np.array([3.0, -2.0]), np.array([1.0, 0.0, 0.0])]]
    assert [len(row) for row in steady(table, 5.0)] == [1, 3]
    assert [len(row) for row in steady(table, 4.9)] == [1, 1]
    assert [len(row) for row in steady([[np.zeros(1), np.zeros(2)]], 3.0)] == [2]  # a step that stands still


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", [name for name in choices.DEFAULTS if name != "rho_rk"])
def test_no_solver_loses_a_degree_in_its_default_setting(solver, schedule):
    order, _ = choices.DEFAULTS[solver]
    scheduler = DEISScheduler(solver=solver, **SCHEDULES[schedule])
    for steps in (1, 2, 3, 5, 8, 10, 20, 50, 100, 1000):
        scheduler.set_timesteps(steps)
        early = 2 if solver == "log_rho" and steps < 15 else 0
        assert degrees(scheduler)[: steps - early] == [min(i, order) for i in range(steps)][: steps - early]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("flag", FLAGS)
def test_grids_that_a_config_brings_in_take_steady_weights(flag, schedule):
    for solver in ("t_ab", "rho_ab", "log_rho"):
        scheduler = DEISScheduler.from_config({**SCHEDULES[schedule], flag: True}, solver=solver)
        for steps in (5, 8, 10, 20, 50):
            scheduler.set_timesteps(steps)
            own = solver == "log_rho" and flag == "use_karras_sigmas"  # the grid that its degree was chosen on
            assert cancelling(scheduler) <= (choices.CANCELS if own else choices.CANCELS_UNASKED)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_named_order_is_kept_until_its_weights_cancel(schedule):
    for solver in ("t_ab", "rho_ab", "log_rho"):
        for grid in ("log", "edm", "beta", "linear"):
            scheduler = DEISScheduler(solver=solver, order=3, timestep_grid=grid, **SCHEDULES[schedule])
            for steps in (5, 10, 20):
                scheduler.set_timesteps(steps)
                assert cancelling(scheduler) <= choices.CANCELS
    scheduler = DEISScheduler(solver="t_ab", order=3, timestep_grid="quad", **SCHEDULES[schedule])
    scheduler.set_timesteps(10)
    assert max(degrees(scheduler)) == 3


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("steps", [5, 8, 10])
def test_errors_of_a_model_are_no_more_than_with_diffusers_solver(flag, steps):
    """2 % of white noise, as quantization makes. Without the bound: 45 with beta's sigmas, diffusers' 0.3 at most."""

    def change(make):
        return analytic.rms(generate(make(), steps, 0.02) - generate(make(), steps, 0.0))

    config = diffusers.EulerDiscreteScheduler(**SD, **{flag: True}).config
    theirs = change(lambda: diffusers.DPMSolverMultistepScheduler.from_config(config))
    assert change(lambda: DEISScheduler.from_config(config)) < 1.5 * theirs + 0.01


@pytest.mark.parametrize("flag", FLAGS[:2])
def test_half_precision_on_a_schedule_that_ends_in_pure_noise(flag):
    """Karras sigmas from 3162 down: weights of 258, and a mean of 61, without the bound."""
    config = {**SCHEDULES["zero snr"], flag: True}
    exact, half = (generate(DEISScheduler(**config), 10, 0.0, dtype) for dtype in (torch.float64, torch.float16))
    assert abs(float(half.mean()) - 0.5) < 0.02 and abs(float(half.std() - exact.std())) < 0.01
