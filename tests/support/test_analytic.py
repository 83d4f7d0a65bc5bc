"""The problems that the samplers are judged by, and their exact solutions."""

import pytest
import torch

import analytic


@pytest.mark.parametrize(("start", "key"), [(999, "exact/x0"), (998, "exact/x0_from_t998")])
def test_the_solver_reaches_the_stored_solution(golden, mixture, start, key):
    alpha_bar = analytic.discrete_alpha_bar(golden["schedule/alphas_cumprod"])
    x0 = analytic.rk4(mixture, torch.from_numpy(golden["x_T"]), alpha_bar(start), alpha_bar(0))
    assert (x0 - torch.from_numpy(golden[key])).abs().max() < 2e-9


def test_the_solver_reaches_a_gaussians_closed_form():
    problem, x = analytic.gaussian(), analytic.noise(8)
    a, a_end = analytic.continuous_alpha_bar(1.0), analytic.continuous_alpha_bar(1e-3)
    exact = problem.flow(x, a, a_end)
    errors = [analytic.rms(analytic.rk4(problem, x, a, a_end, steps) - exact) for steps in (100, 200, 1000)]
    assert errors[2] < 1e-9 and 12 < errors[0] / errors[1] < 20  # fourth order: 16


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_epsilon_is_the_noise_to_expect(mixture, kind):
    """E[(n - epsilon(x_t))  f(x_t)] = 0 for any f: here for f = 1 and f = epsilon."""
    if kind == "gaussian":
        problem = analytic.gaussian(dim=2)
        x0 = analytic.noise(200_000, 2) * problem.variances.sqrt() @ problem.vectors.T + problem.mean
    else:
        problem, generator = mixture, torch.Generator().manual_seed(2)
        which = torch.multinomial(mixture.weights, 200_000, replacement=True, generator=generator)
        x0 = torch.einsum("nij,nj->ni", torch.linalg.cholesky(mixture.covs)[which], analytic.noise(200_000, 2))
        x0 = x0 + mixture.means[which]
    n, a = analytic.noise(200_000, 2, seed=3), 0.4
    eps = problem.epsilon(a**0.5 * x0 + (1 - a) ** 0.5 * n, a)
    assert (n - eps).mean(0).abs().max() < 0.01
    assert abs(((n - eps) * eps).sum(1).mean()) < 0.01 and (eps * eps).sum(1).mean() > 0.5
