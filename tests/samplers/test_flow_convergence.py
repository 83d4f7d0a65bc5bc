"""How fast errors fall with the number of steps on exact velocity fields, from pure noise (s = 1) to data (s = 0)."""

import math

import diffusers
import pytest
import torch

import analytic
from ptq4dm.samplers import DEISScheduler
from ptq4dm.samplers.maths.coefficients import RUNGE_KUTTA

PROBLEMS = {"gaussian": analytic.gaussian, "mixture": analytic.mixture}
CLASSICAL = {"1euler": 1, "2heun": 2, "3kutta": 3, "3heun": 3, "3ral": 3, "4rk": 4}


def flow(**options):
    return DEISScheduler(prediction_type="flow_prediction", lower_order_final=False, **options)


@pytest.fixture(scope="module", params=PROBLEMS)
def error(request):
    """error(scheduler, steps, sigmas): median over samples of the rms distance from the solution."""
    problem, x = PROBLEMS[request.param](), analytic.noise(32)
    known = request.param == "gaussian"
    solution = problem.carried(x, (0, 1), (1, 0)) if known else finest(problem, x)

    def measure(scheduler, steps, **given):
        scheduler.set_timesteps(steps, **given)
        ours = analytic.solve_flow(scheduler, problem, x)
        return float((ours - solution).square().mean(1).sqrt().median())

    return measure


def finest(problem, x):
    """Classical Runge-Kutta, in 400 steps that shrink towards the data."""
    levels = torch.linspace(1, 0, 401, dtype=torch.float64) ** 2
    for s, end in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        h = end - s
        k1 = problem.velocity(x, s)
        k2 = problem.velocity(x + h / 2 * k1, s + h / 2)
        k3 = problem.velocity(x + h / 2 * k2, s + h / 2)
        k4 = problem.velocity(x + h * k3, end)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def observed_order(error, steps, **options):
    return math.log2(error(flow(**options), steps) / error(flow(**options), 2 * steps))


@pytest.mark.parametrize("integrand", ["epsilon", "velocity"])
@pytest.mark.parametrize("solver", ["t_ab", "rho_ab"])
def test_order_0_is_eulers_step_whatever_is_integrated(error, solver, integrand):
    ours = flow(solver=solver, integrand=integrand, order=0, timestep_grid="diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    assert error(ours, 12) == pytest.approx(error(theirs, 12), rel=1e-4)  # its levels are float32


@pytest.mark.parametrize("options", [{"solver": "t_ab"}, {"solver": "rho_ab"}, {"solver": "ipndm"}], ids=str)
@pytest.mark.parametrize("integrand", ["epsilon", "velocity"])
def test_order_1_and_above_converge_at_least_at_order_2(error, options, integrand):
    """One step of order 0, from pure noise, has an error of O(h^2); ipndm's weights are right for even ones alone."""
    for order in (1, 2, 3):
        assert observed_order(error, 80, order=order, integrand=integrand, **options) > 1.7
    assert 0.9 < observed_order(error, 80, order=0, integrand=integrand, **options) < 1.15


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_runge_kutta_has_its_classical_order(error, method):
    """Also those with a stage at the end of a step, where the last one ends at clean data."""
    ends = RUNGE_KUTTA[method][0][-1] == 1
    steps = 160 if ends else 80  # until one step resolves the narrowest direction of the data
    observed = observed_order(error, steps, solver="rho_rk", rk_method=method)
    assert observed > CLASSICAL[method] - 0.35


def test_log_rho_is_of_order_1_at_least_and_falls(error):
    for order in (1, 2):
        assert observed_order(error, 80, solver="log_rho", order=order) > 0.9


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_higher_orders_beat_euler_at_equal_evaluations(error, shift):
    for steps in (8, 16):
        euler = error(flow(solver="t_ab", order=0, shift=shift), steps)
        for solver in ("t_ab", "ipndm", "rho_ab"):
            assert error(flow(solver=solver, shift=shift), steps) < euler * 0.8


@pytest.mark.parametrize("solver", ["t_ab", "ipndm", "rho_ab", "rho_rk"])
def test_against_diffusers_at_20_evaluations(error, solver):
    """Far ahead of FlowMatchEuler with the same levels, ahead of its flow DEIS, level with Heun or ahead of it."""
    given = {"sigmas": [1 - k / 20 for k in range(20)]}
    ours = flow(solver=solver)
    mine = error(ours, None, **given) if solver != "rho_rk" else error(ours, 7)
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    euler = error(diffusers.FlowMatchEulerDiscreteScheduler(), 20, **given)
    heun = error(diffusers.FlowMatchHeunDiscreteScheduler(), 10)
    assert mine < euler / 3 and mine < 1.1 * heun
    deis = diffusers.DEISMultistepScheduler(solver_order=3, **flows)
    assert mine < error(deis, 20)


def test_a_polynomial_that_passes_through_pure_noise_is_exact_there():
    """Data that is one point: epsilon is constant, so every order of DEIS is exact in any number of steps."""
    point = torch.tensor([[0.7, -0.3]], dtype=torch.float64)
    x = analytic.noise(4, 2)
    for order in (0, 1, 2, 3):
        for solver in ("t_ab", "rho_ab", "log_rho", "ipndm"):
            scheduler = flow(solver=solver, order=order, integrand="epsilon", shift=3.0)
            scheduler.set_timesteps(5)
            y = x
            for t in scheduler.timesteps:
                s = float(t) / 1000
                y = scheduler.step((y - point) / s, t, y).prev_sample  # v = n - x_0, with n = (x - (1 - s) x_0) / s
            assert (y - point).abs().max() < 1e-6  # the model is told s in float32
