"""Against outputs of the DEIS authors' own code (data/README.md says what they are)."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analytic
from ptq4dm.samplers import DEISScheduler, plan

GRIDS = {"t1": "linear", "t2": "quad", "t3": "cubic", "log1": "log", "rho7": "edm"}
STAGES = {"1euler": 1, "2heun": 2, "3kutta": 3, "3heun": 3, "3ral": 3, "4rk": 4}
BUDGETS = (5, 10, 20)


@pytest.fixture(scope="module")
def run(golden, mixture):
    """run(grid, method, budget): absolute differences from the authors' output, largest of each sample."""
    alphas_cumprod, x = golden["schedule/alphas_cumprod"], torch.from_numpy(golden["x_T"])
    alpha_bar = analytic.discrete_alpha_bar(alphas_cumprod)

    def differences(grid, method, budget):
        if method.startswith("rho_rk"):
            rk_method = method.removeprefix("rho_rk_")
            options, steps = {"solver": "rho_rk", "rk_method": rk_method}, -(-budget // STAGES[rk_method])
        else:
            options, steps = {"solver": method[:-1], "order": int(method[-1])}, budget
        scheduler = DEISScheduler(timestep_grid=GRIDS[grid], **options)
        scheduler.set_timesteps(steps)
        ours = analytic.solve(scheduler, mixture, alpha_bar, x)
        stored = "ipndm" if method == "ipndm3" else method
        return np.abs(ours.numpy() - golden[f"out/disc/int/{grid}/{stored}/nfe{budget}"]).max(1)

    return differences


def test_noise_schedule(golden):
    given = golden["schedule/alphas_cumprod"]
    for options in ({}, {"trained_betas": (1 - given / np.append(1, given[:-1])).tolist()}):
        assert np.abs(DEISScheduler(**options).schedule.alphas_cumprod / given - 1).max() < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 7, 10, 20])
def test_timesteps(golden, grid, steps):
    times = golden[f"grid/disc/int/{grid}/ts/n{steps}"]
    assert times[-1] == 0  # where the last step ends; the model is not called there
    scheduler = DEISScheduler(timestep_grid=GRIDS[grid])
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.dtype == torch.int64 and scheduler.timesteps.tolist() == times[:-1].tolist()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", ["rho_ab0", *(f"rho_rk_{name}" for name in STAGES)])
def test_methods_without_quadrature(run, grid, method):
    """They find stage times from 2 - alpha_bar, where rounding costs 1e-10 in t: not 1e-14 as for rho_ab0."""
    bound = 1e-12 if method in ("rho_ab0", "rho_rk_1euler") else 1e-8
    assert max(run(grid, method, budget).max() for budget in BUDGETS) < bound


def test_ipndm(run):
    assert max(run("t1", "ipndm3", budget).max() for budget in BUDGETS) < 1e-12


def left_sums(solver, schedule, times, rho_end):
    """multistep_rule with the authors' weights."""
    return SimpleNamespace(table=partial(left_sum, solver, schedule, times, rho_end))


def left_sum(solver, schedule, times, rho_end, order):
    """Weights as the authors have them: left Riemann sums of 10,000 points, in t or in rho."""
    alphas, fraction = schedule.alphas_cumprod, np.arange(10_000) / 10_000

    def rho(t):
        return np.sqrt((1 - schedule.alpha_bar(t)) / schedule.alpha_bar(t))

    def slope(t):
        below, a = np.minimum(np.floor(t).astype(int), len(alphas) - 2), schedule.alpha_bar(t)
        return -0.5 * (alphas[below + 1] - alphas[below]) / (a**1.5 * np.sqrt(1 - a))

    times = np.append(times, 0.0)
    nodes, table = (times if solver == "t_ab" else rho(times)), []
    for i, (start, end) in enumerate(zip(nodes[:-1], nodes[1:], strict=True)):
        points, table = start * (1 - fraction) + end * fraction, [*table, []]
        density = slope(points) if solver == "t_ab" else np.ones_like(points)
        for k in range(min(i, order) + 1):
            near = nodes[i - k : i + 1][::-1]
            basis = [np.prod([(points - m) / (n - m) for m in near if m != n] + [density], axis=0) for n in near]
            table[-1].append(np.sum(basis, axis=1) * (end - start) / 10_000)
    return table


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_rho_ab_with_the_authors_sums(run, grid, order, monkeypatch):
    monkeypatch.setattr(plan, "multistep_rule", left_sums)
    assert max(run(grid, f"rho_ab{order}", budget).max() for budget in BUDGETS) < 1e-12


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("grid", "budget"), [("t2", 10), ("t2", 20), ("t3", 5), ("t3", 10)])
def test_t_ab_with_the_authors_sums(run, grid, budget, order, monkeypatch):
    """In other rows a point of the sum falls on a whole timestep, where the slope jumps, and rounding chooses."""
    monkeypatch.setattr(plan, "multistep_rule", left_sums)
    assert run(grid, f"t_ab{order}", budget).max() < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_rho_ab(run, grid, order):
    """The integrand is a polynomial, so that the authors' sums are off by 1e-4 of the weights at most."""
    for budget in BUDGETS:
        difference = run(grid, f"rho_ab{order}", budget)
        assert difference.max() < 2e-3 and np.median(difference) < 3e-5


# Largest and median difference at 5, 10 and 20 evaluations.
T_AB_BOUNDS = {
    "t1": ((2e-3, 3e-4), (2e-3, 3e-4), (5e-4, 5e-5)),
    "t2": ((2e-2, 2e-3), (3e-3, 3e-4), (2e-3, 1e-4)),
    "t3": ((8e-2, 5e-3), (2e-2, 6e-4), (2e-3, 2e-4)),
    "log1": ((5e-2, 2e-3), (2e-2, 2e-4), (1e-2, 1e-4)),
    "rho7": ((5e-3, 6e-4), (3e-3, 2e-4), (2e-3, 1e-4)),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_t_ab(run, grid, order):
    """What remains is the error of the authors' sums (the tests above have none with those sums).

    A left sum of N points is off by (f(start) - f(end)) h / 2N, f = drho / dt: f falls steeply with t, and the first
    steps are longest where times crowd at 0. So 5 steps of the cubic and the log grid are worst. The largest
    difference is that of a sample between two modes, which the ODE drives apart; the median is ten times less.
    """
    for budget, (largest, median) in zip(BUDGETS, T_AB_BOUNDS[grid], strict=True):
        difference = run(grid, f"t_ab{order}", budget)
        assert difference.max() < largest and np.median(difference) < median


@pytest.mark.parametrize(("grid", "start"), [("quad", "exact/x0_from_t998"), ("edm", "exact/x0")])
def test_more_evaluations_and_higher_orders_come_closer_to_the_solution(golden, mixture, grid, start):
    """In the median: at few evaluations a sample or two end in the wrong mode."""
    alpha_bar, exact = analytic.discrete_alpha_bar(golden["schedule/alphas_cumprod"]), torch.from_numpy(golden[start])

    def error(order, budget):
        scheduler = DEISScheduler(solver="t_ab", order=order, timestep_grid=grid)
        scheduler.set_timesteps(budget)
        ours = analytic.solve(scheduler, mixture, alpha_bar, torch.from_numpy(golden["x_T"]))
        return float((ours - exact).norm(dim=1).median())

    low, high = ([error(order, budget) for budget in BUDGETS] for order in (0, 3))
    assert all(before / after > 1.8 for before, after in pairwise(low))
    assert all(before / after > 3 for before, after in pairwise(high))
    assert all(a / b > 2.5 for a, b in zip(low, high, strict=True)) and high[-1] < 0.01
