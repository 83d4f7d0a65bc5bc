"""Diffusion problems with known solutions, and a solver that is exact for them; all float64.

x_t = sqrt(a) x_0 + sqrt(1 - a) n. A problem's epsilon(x, a) is what a perfect model predicts for x [B, D]. Of flow
matching, x_s = (1 - s) x_0 + s n, its velocity(x, s) is that.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Gaussian:
    """N(mean, V diag(variances) V^T)."""

    mean: torch.Tensor
    variances: torch.Tensor
    vectors: torch.Tensor

    def epsilon(self, x, a):
        return self.parts(x, a**0.5, (1 - a) ** 0.5)[1]

    def velocity(self, x, s):
        x0, eps = self.parts(x, 1 - s, s)
        return eps - x0

    def parts(self, x, alpha, sigma):
        """The expected x_0 and epsilon in x = alpha x_0 + sigma epsilon."""
        y = (x - alpha * self.mean) @ self.vectors / (alpha**2 * self.variances + sigma**2)
        return self.mean + alpha * (self.variances * y) @ self.vectors.T, sigma * y @ self.vectors.T

    def flow(self, x, a, a_end):
        """Where the ODE takes x from noise level a to a_end."""
        return self.carried(x, (a**0.5, (1 - a) ** 0.5), (a_end**0.5, (1 - a_end) ** 0.5))

    def carried(self, x, start, end):
        """The same between two (alpha, sigma): along each axis in proportion to the deviation there."""
        before, after = (alpha**2 * self.variances + sigma**2 for alpha, sigma in (start, end))
        y = (x - start[0] * self.mean) @ self.vectors * (after / before).sqrt()
        return end[0] * self.mean + y @ self.vectors.T


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], covs[k])."""

    means: torch.Tensor
    weights: torch.Tensor
    covs: torch.Tensor

    def epsilon(self, x, a):
        return self.parts(x, a**0.5, (1 - a) ** 0.5)[1]

    def velocity(self, x, s):
        x0, eps = self.parts(x, 1 - s, s)
        return eps - x0

    def parts(self, x, alpha, sigma):
        """The expected x_0 and epsilon in x = alpha x_0 + sigma epsilon."""
        cov = alpha**2 * self.covs + sigma**2 * torch.eye(x.shape[1], dtype=x.dtype)
        away = x[:, None] - alpha * self.means
        scaled = torch.einsum("kij,nkj->nki", torch.linalg.inv(cov), away)
        log_weight = self.weights.log() - (away * scaled).sum(-1) / 2 - torch.logdet(cov) / 2
        share = log_weight.softmax(1)[..., None]
        x0 = self.means + alpha * torch.einsum("kij,nkj->nki", self.covs, scaled)
        return (share * x0).sum(1), sigma * (share * scaled).sum(1)


def gaussian(dim=16, seed=0):
    """A Gaussian with a random mean and random axes, variances from 1e-3 to 2."""
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    return Gaussian(mean, torch.logspace(-3, math.log10(2), dim, dtype=torch.float64), vectors)


def noise(samples, dim=16, seed=1):
    return torch.randn(samples, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def continuous_alpha_bar(t):
    """The VP-SDE with beta from 0.1 to 20."""
    return math.exp(-0.5 * t * t * 19.9 - 0.1 * t)


def discrete_alpha_bar(alphas_cumprod):
    """alpha_bar(t), linear between timesteps."""
    return lambda t: float(np.clip(np.interp(t, np.arange(len(alphas_cumprod)), alphas_cumprod), 1e-7, 1 - 1e-7))


def rk4(problem, x, a, a_end, steps=1000):
    """Classical Runge-Kutta for dv / drho = epsilon, v = x / sqrt(alpha_bar), in steps even in log rho."""

    def slope(log_rho, v):
        rho = math.exp(log_rho)
        return rho * problem.epsilon(v / math.sqrt(1 + rho * rho), 1 / (1 + rho * rho))

    start, end = (math.log((1 - b) / b) / 2 for b in (a, a_end))
    v, h = x / a**0.5, (end - start) / steps
    for i in range(steps):
        u = start + i * h
        k1 = slope(u, v)
        k2 = slope(u + h / 2, v + h / 2 * k1)
        k3 = slope(u + h / 2, v + h / 2 * k2)
        k4 = slope(u + h, v + h * k3)
        v = v + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return v * a_end**0.5


def solve(scheduler, problem, alpha_bar, x):
    """The scheduler's answer, from its first timestep to its last."""
    for t in scheduler.timesteps:
        x = scheduler.step(problem.epsilon(x, alpha_bar(float(t))), t, x).prev_sample
    return x


def solve_flow(scheduler, problem, x):
    """The answer of a flow-matching scheduler, diffusers' or ours, for a model that is told 1000 s."""
    for t in scheduler.timesteps:
        x = scheduler.step(problem.velocity(x, float(t) / 1000), t, x, return_dict=False)[0]
    return x


def mixture(number=12, dim=16, seed=0):
    """Equal Gaussians with random means and axis-parallel spreads."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(number, dim, generator=generator, dtype=torch.float64)
    spread = torch.rand(number, dim, generator=generator, dtype=torch.float64) * 0.15 + 0.002
    return Mixture(means, torch.full((number,), 1 / number, dtype=torch.float64), torch.diag_embed(spread))


def rms(error):
    return float(error.square().mean().sqrt())
