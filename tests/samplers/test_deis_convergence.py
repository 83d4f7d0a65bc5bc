"""How fast the solvers' errors fall with the number of steps, on Gaussian data, where the solution is known."""

import math

import pytest

import analytic
from ptq4dm.samplers import DEISScheduler
from ptq4dm.samplers.maths.coefficients import RUNGE_KUTTA

CONTINUOUS = {"beta_schedule": "continuous", "beta_start": 0.1, "beta_end": 20.0}
CLASSICAL = {"1euler": 1, "2heun": 2, "3kutta": 3, "3heun": 3, "3ral": 3, "4rk": 4}


@pytest.fixture(scope="module")
def error():
    """error(steps, **options): rms distance from the solution, at the end of the continuous schedule.

    `skip` leaves out that fraction of the steps: the start is then the exact solution there.
    """
    alpha_bar = analytic.continuous_alpha_bar

    def measure(steps, skip=0.0, dim=16, **options):
        problem, x = analytic.gaussian(dim), analytic.noise(8, dim)
        scheduler = DEISScheduler(lower_order_final=False, **CONTINUOUS, **options)
        scheduler.set_timesteps(steps)
        scheduler.timesteps = scheduler.timesteps[int(steps * skip) * scheduler.order :]
        begin = problem.flow(x, alpha_bar(1.0), alpha_bar(float(scheduler.timesteps[0])))
        ours = analytic.solve(scheduler, problem, alpha_bar, begin)
        return analytic.rms(ours - problem.flow(x, alpha_bar(1.0), alpha_bar(1e-3)))

    return measure


def observed_order(error, steps, **options):
    return math.log2(error(steps, **options) / error(2 * steps, **options))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("solver", ["t_ab", "rho_ab", "log_rho"])
def test_a_polynomial_of_degree_r_gives_order_r_plus_1(error, solver, order):
    """The first steps, of lower degree, cost O(h^2), but next to nothing: epsilon is constant near pure noise."""
    observed = observed_order(error, 80, solver=solver, order=order, timestep_grid="edm")
    assert order + 1 - 0.45 < observed < order + 1 + 0.45


@pytest.mark.parametrize("solver", ["t_ab", "rho_ab", "log_rho"])
def test_a_start_at_half_noise_limits_the_order_to_2(error, solver):
    """One step of order 0 has an error of O(h^2), which no later step takes away; orders 2 and 3 lose most."""
    for order in (1, 2, 3):
        observed = observed_order(error, 80, skip=0.5, solver=solver, order=order, timestep_grid="quad")
        assert 1.9 < observed < 2.15


@pytest.mark.parametrize("grid", ["quad", "edm"])
def test_weights_for_even_steps_give_order_2_on_uneven_ones(error, grid):
    """Neighbouring steps differ in length by O(h), and the weights are wrong by as much: O(h^3) a step."""
    for order in (0, 1, 2, 3):
        observed = observed_order(error, 80, solver="ipndm", order=order, timestep_grid=grid)
        assert abs(observed - min(order + 1, 2)) < 0.1


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_runge_kutta_has_its_classical_order(error, method):
    observed = observed_order(error, 40, solver="rho_rk", rk_method=method, timestep_grid="quad")
    assert abs(observed - CLASSICAL[method]) < 0.15


@pytest.mark.parametrize("method", [name for name in RUNGE_KUTTA if name != "1euler"])
def test_runge_kutta_needs_no_start(error, method):
    observed = observed_order(error, 80, skip=0.5, solver="rho_rk", rk_method=method, timestep_grid="quad")
    assert abs(observed - CLASSICAL[method]) < 0.2


@pytest.mark.parametrize("grid", ["quad", "edm"])
@pytest.mark.parametrize("solver", ["t_ab", "rho_ab", "log_rho"])
def test_a_higher_degree_is_never_worse(error, solver, grid):
    for steps in (20, 40):
        errors = [error(steps, solver=solver, order=order, timestep_grid=grid) for order in range(4)]
        assert all(high < 1.2 * low for low, high in zip(errors[:-1], errors[1:], strict=True))
        assert errors[3] < errors[0] / 4


@pytest.mark.parametrize("evaluations", [5, 10, 20])
def test_the_ranking_of_the_paper(error, evaluations):
    """Of its CIFAR-10 FIDs (arXiv:2204.13902): DDIM, rho_ab 1 to 3, t_ab 1 to 3, from worst to best.

    At 20 evaluations, where all are close, t_ab 1 is only better than rho_ab 1 here.
    """
    rho_ab, t_ab = (
        [error(evaluations, dim=64, solver=solver, order=order, timestep_grid="quad") for order in range(4)]
        for solver in ("rho_ab", "t_ab")
    )
    assert rho_ab[0] == pytest.approx(t_ab[0], rel=1e-9)
    ranking = [*rho_ab, *t_ab[1:]]
    if evaluations < 20:
        assert ranking == sorted(ranking, reverse=True)
    else:
        assert rho_ab == sorted(rho_ab, reverse=True) and t_ab == sorted(t_ab, reverse=True)
        assert all(t < rho for t, rho in zip(t_ab[1:], rho_ab[1:], strict=True))


def test_stages_at_the_end_of_the_step_fail_in_long_steps(error):
    """At 6 to 8 evaluations, as in the paper (FIDs above 100, DDIM's is 27); stages before the end do not."""

    def run(method, steps):
        return error(steps, solver="rho_rk", rk_method=method, timestep_grid="quad")

    ddim = error(6, solver="t_ab", order=0, timestep_grid="quad")
    for method, steps in (("2heun", 3), ("3kutta", 2), ("4rk", 2)):
        assert run(method, steps) > 10 * ddim
    for method in ("3heun", "3ral"):
        assert run(method, 2) < 2 * ddim and run(method, 7) < ddim / 10


@pytest.mark.parametrize(
    ("solver", "ratio"), [("ipndm", 4), ("t_ab", 10), ("rho_ab", 8), ("log_rho", 12), ("rho_rk", 50)]
)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_discrete_schedules(schedule, solver, ratio):
    """Each solver in its default setting: the error at 40 steps, and against that at 10 (order 1 would give 4)."""
    problem, x = analytic.gaussian(), analytic.noise(8)
    scheduler = DEISScheduler(beta_schedule=schedule, solver=solver)
    alpha_bar = analytic.discrete_alpha_bar(scheduler.schedule.alphas_cumprod)

    def error(steps):
        scheduler.set_timesteps(steps)
        exact = problem.flow(x, alpha_bar(float(scheduler.timesteps[0])), alpha_bar(0))
        return analytic.rms(analytic.solve(scheduler, problem, alpha_bar, x) - exact)

    assert error(40) < 0.012 and error(10) / error(40) > ratio
