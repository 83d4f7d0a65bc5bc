"""The corrector: a step done again with the evaluation at its end, which costs none."""

import math

import numpy as np
import pytest
import torch

import analytic
from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.choices import CANCELS_CORRECTED
from ptq4dm.samplers.maths.coefficients import multistep_rule, plain_rule
from ptq4dm.samplers.maths.corrector import corrected
from ptq4dm.samplers.maths.paths import Flow
from ptq4dm.samplers.maths.schedule import ContinuousVP

CONTINUOUS = {"beta_schedule": "continuous", "beta_start": 0.1, "beta_end": 20.0}
FLOW = {"prediction_type": "flow_prediction"}
ADAMS_MOULTON = ([1 / 2, 1 / 2], [5 / 12, 8 / 12, -1 / 12], [9 / 24, 19 / 24, -5 / 24, 1 / 24])


def test_over_even_steps_it_is_adams_and_moultons():
    for rule in (plain_rule(np.arange(5.0), even=True), plain_rule(np.arange(5.0), even=False)):
        for degree, weights in enumerate(ADAMS_MOULTON, 1):
            assert np.allclose(rule.over(2, 3, degree), weights, rtol=1e-12, atol=0)


def test_of_degree_1_and_even_steps_it_comes_to_three_terms():
    """3/2 and -1/2, and 5/12, -10/12, 5/12 for the correction: Adams and Bashforth's weights of one degree more.

    Behind the first step, of degree 0, the trapezium takes its place: 1/2, -1/2.
    """
    rule = plain_rule(np.arange(5.0), even=True)
    table = corrected(rule.table(1), rule, CANCELS_CORRECTED)
    assert [len(row) for row in table] == [1, 2, 3, 3]
    assert np.allclose(table[1][1], [2, -1]) and np.allclose(table[3][2], [23 / 12, -16 / 12, 5 / 12])
    assert np.allclose(table[3][0], [1]) and np.allclose(table[3][1], [2, -1])  # begun in the middle
    assert np.allclose(corrected(rule.table(1), rule, 3.5)[3][2], [3 / 2, -1 / 2, 0])  # 44 / 12 is above 3.5


def again(rule, order, slope):
    """v at the end, from 1: each step done again in so many words, the old state kept; slope(level, v)."""
    levels, table = rule.levels, rule.table(order)
    start, seen = 1.0, [slope(levels[0], 1.0)]
    v = start + table[0][0][0] * seen[0]
    for i in range(1, len(table)):
        seen.insert(0, slope(levels[i], v))
        degree = len(table[i - 1])
        start = start + sum(w * g for w, g in zip(rule.over(i - 1, i, degree), seen, strict=False))
        v = start + sum(w * g for w, g in zip(table[i][-1], seen, strict=False))
    return v


@pytest.mark.parametrize("solver", ["t_ab", "rho_ab", "log_rho", "ipndm"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_one_update_of_what_the_model_saw_is_the_step_done_again(solver, order):
    rule = multistep_rule(solver, ContinuousVP(), np.array([0.9, 0.7, 0.4, 0.3, 0.15, 0.05]), 0.02)

    def slope(level, v):
        return math.sin(level) - 0.3 * v

    v, seen = 1.0, []
    for level, row in zip(rule.levels, corrected(rule.table(order), rule, math.inf), strict=False):
        seen.insert(0, slope(level, v))
        v += sum(w * g for w, g in zip(row[-1], seen, strict=False))
    assert v == pytest.approx(again(rule, order, slope), rel=1e-12)
    plain, seen = 1.0, []
    for level, row in zip(rule.levels, rule.table(order), strict=False):
        seen.insert(0, slope(level, plain))
        plain += sum(w * g for w, g in zip(row[-1], seen, strict=False))
    assert abs(plain - v) > 1e-3


def test_a_constant_keeps_its_integral_and_a_start_at_infinity_is_left_alone():
    times = np.array([1.0, 0.8, 0.5, 0.2])
    for solver in ("t_ab", "rho_ab", "log_rho"):
        rule = multistep_rule(solver, Flow(), times, 0.0)
        plain, table = rule.table(1), corrected(rule.table(1), rule, math.inf)
        assert all(np.array_equal(one, two) for one, two in zip(plain[1], table[1], strict=True))
        for i in (2, 3):
            length = rule.levels[i + 1] - rule.levels[i]
            assert [weights.sum() for weights in table[i]] == pytest.approx([length] * len(table[i]))


@pytest.fixture(scope="module", params=["gaussian", "mixture"])
def error(request):
    """error(steps, **options) of a flow: median over samples of the rms distance from the solution."""
    problem, x = getattr(analytic, request.param)(dim=4), analytic.noise(16, 4)
    solution = solve(problem, x, 120, solver="rho_rk", rk_method="4rk", timestep_grid="quad")

    def measure(steps, **options):
        return float((solve(problem, x, steps, **options) - solution).square().mean(1).sqrt().median())

    return measure


def solve(problem, x, steps, **options):
    scheduler = DEISScheduler(**FLOW, lower_order_final=False, **options)
    scheduler.set_timesteps(steps)
    return analytic.solve_flow(scheduler, problem, x)


@pytest.mark.parametrize("solver", ["t_ab", "ipndm"])
@pytest.mark.parametrize("order", [0, 1])
def test_it_raises_the_order_of_velocities_by_one(error, solver, order):
    """The first step too: behind it the trapezium leaves O(h^3)."""
    errors = [error(n, solver=solver, order=order, integrand="velocity", corrector=True) for n in (40, 80)]
    assert order + 1.75 < math.log2(errors[0] / errors[1]) < order + 2.6


def test_it_is_the_default_of_velocities_and_ahead_at_8_to_20_evaluations(error):
    for steps in (8, 12, 20):
        assert error(steps) == error(steps, corrector=True) < 0.9 * error(steps, corrector=False)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("solver", ["t_ab", "rho_ab", "log_rho"])
def test_it_raises_the_order_of_epsilon_by_one(solver, order):
    problem, x = analytic.gaussian(4), analytic.noise(8, 4)
    alpha_bar, errors = analytic.continuous_alpha_bar, []
    solution = problem.flow(x, alpha_bar(1.0), alpha_bar(1e-3))
    for steps in (40, 80):
        options = {"solver": solver, "order": order, "timestep_grid": "edm", "lower_order_final": False}
        scheduler = DEISScheduler(**CONTINUOUS, corrector=True, **options)
        scheduler.set_timesteps(steps)
        errors.append(analytic.rms(analytic.solve(scheduler, problem, alpha_bar, x) - solution))
    assert order + 1.6 < math.log2(errors[0] / errors[1]) < order + 2.6


def test_begun_in_the_middle_the_first_step_there_has_nothing_to_correct():
    x, answers = analytic.noise(2), {}
    for corrector in (False, True):
        scheduler = DEISScheduler(**FLOW, corrector=corrector)
        scheduler.set_timesteps(6)
        y, answers[corrector] = x, []
        for t in scheduler.timesteps[3:]:
            y = scheduler.step(torch.sin(y), t, y).prev_sample
            answers[corrector].append(y)
    assert torch.equal(answers[False][0], answers[True][0]) and not torch.equal(answers[False][1], answers[True][1])


def test_who_has_one():
    def corrects(scheduler):
        return scheduler._choice.corrects

    assert corrects(DEISScheduler(**FLOW)) and corrects(DEISScheduler(**FLOW, order=2))
    others = (
        {"order": 0},
        {"solver": "ipndm"},
        {"integrand": "epsilon"},
        {"solver": "log_rho"},
        {"corrector": False},
    )
    assert not any(corrects(DEISScheduler(**FLOW, **options)) for options in others)
    assert not corrects(DEISScheduler()) and corrects(DEISScheduler(corrector=True))
    assert not corrects(DDIMScheduler.from_config({**DEISScheduler(**FLOW).config, "order": None}))
    config = DEISScheduler(**FLOW).config
    assert not corrects(make_sampler("t_ab1/linear/velocity", config))
    assert corrects(make_sampler("t_ab1/linear/velocity/corrected", config)) and corrects(
        make_sampler("deis", config)
    )
    assert corrects(DEISScheduler.from_config(DEISScheduler(corrector=True).config))
    for options in (FLOW, {}):
        with pytest.raises(UserError, match="corrector is of multistep solvers; solver 'rho_rk' has none"):
            DEISScheduler(solver="rho_rk", corrector=True, **options)
    with pytest.raises(UserError, match="corrector"):
        DEISScheduler(corrector="yes")
