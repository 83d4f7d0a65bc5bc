"""The weights of a step integrate, over rho, every polynomial of their degree exactly."""

import numpy as np
import pytest
from scipy.integrate import quad

from ptq4dm.samplers.maths.coefficients import RUNGE_KUTTA, multistep_rule, plain_rule
from ptq4dm.samplers.maths.schedule import ContinuousVP, DiscreteVP, discrete_betas

SCHEDULES = {
    "continuous": ContinuousVP(),
    **{
        name: DiscreteVP(np.cumprod(1 - discrete_betas(1000, 0.0001, 0.02, name, None)))
        for name in ("linear", "scaled_linear", "squaredcos_cap_v2")
    },
}
# Of even steps, newest evaluation first (Hairer, Norsett and Wanner, Solving ODEs I, III.1).
ADAMS_BASHFORTH = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
ADAMS_MOULTON = ([1 / 2, 1 / 2], [5 / 12, 8 / 12, -1 / 12], [9 / 24, 19 / 24, -5 / 24, 1 / 24])
TIMES = {"continuous": [1.0, 0.81, 0.49, 0.16, 0.02], "discrete": [990.0, 700.0, 391.0, 120.0, 3.0]}


def integral(solver, schedule, power, start, end, rho_start, rho_end):
    """Of u^power drho from rho_start to rho_end, u being t, rho or log rho; t from start to end, and then held."""
    if solver == "rho_ab":
        return (rho_end ** (power + 1) - rho_start ** (power + 1)) / (power + 1)
    if solver == "log_rho":
        return quad(lambda rho: np.log(rho) ** power, rho_start, rho_end, epsabs=0, epsrel=1e-11)[0]
    # By parts: t^p drho = d(t^p rho) - p t^(p-1) rho dt. With t = s^2 that integrand is smooth between timesteps.
    edges = (
        np.arange(np.ceil(start) - 1, end, -1.0) if schedule.discrete else np.geomspace(start, end + 1e-4, 65)[1:-1]
    )
    edges = np.sqrt([start, *edges, end])
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    nodes, weights = np.polynomial.legendre.leggauss(20)
    s = middle[:, None] + half[:, None] * nodes
    inner = (2 * power * s ** (2 * power - 1) * schedule.rho(s * s) * weights * half[:, None]).sum()
    return end**power * rho_end - start**power * rho_start - inner


@pytest.mark.parametrize("clean", [False, True], ids=["to the last time", "to clean data"])
@pytest.mark.parametrize("solver", ["t_ab", "rho_ab", "log_rho"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_for_polynomials(name, solver, clean):
    schedule = SCHEDULES[name]
    times = np.array(TIMES["discrete" if schedule.discrete else name])
    last = 0.0 if schedule.discrete or clean else schedule.last
    rho = np.append(schedule.rho(times), 0.0 if clean else schedule.rho(last))
    nodes = {"t_ab": times, "rho_ab": rho[:-1], "log_rho": np.log(rho[:-1])}[solver]
    table = multistep_rule(solver, schedule, times, rho[-1]).table(3)
    assert [len(row) for row in table] == [1, 2, 3, 4, 4]
    for i, row in enumerate(table):
        end = times[i + 1] if i + 1 < len(times) else last
        for degree, weights in enumerate(row):
            near = nodes[i - degree : i + 1][::-1]
            for power in range(degree + 1):
                exact = integral(solver, schedule, power, times[i], end, rho[i], rho[i + 1])
                scale = np.abs(weights * near**power).sum()
                assert abs((weights * near**power).sum() - exact) < 1e-9 * scale


def test_ipndm_has_the_weights_for_even_steps():
    """Adams and Bashforth's, scaled with the step in rho."""
    table = plain_rule(np.arange(5.0), even=True).table(3)
    for degree, weights in enumerate(ADAMS_BASHFORTH):
        assert np.allclose(table[3][degree], weights, rtol=1e-13, atol=0)
    schedule = SCHEDULES["linear"]
    times = np.array(TIMES["discrete"])
    table = multistep_rule("ipndm", schedule, times, 0.0).table(2)
    step = np.diff(np.append(schedule.rho(times), 0.0))
    assert np.allclose(table[4][2], np.array([23, -16, 5]) / 12 * step[4]) and np.allclose(table[2][0], step[2])


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_runge_kutta_tables_are_consistent(method):
    nodes, matrix, final = RUNGE_KUTTA[method]
    assert sum(final) == pytest.approx(1) and len(final) == len(matrix) == len(nodes)
    assert [sum(row) for row in matrix] == pytest.approx(nodes)
    assert [len(row) for row in matrix] == list(range(len(nodes)))
