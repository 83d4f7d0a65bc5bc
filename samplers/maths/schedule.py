"""Variance-preserving noise schedules in float64: x_t = sqrt(a(t)) x_0 + sqrt(1 - a(t)) n, a = alpha_bar.

Those of flow matching and of EDM, in paths.py, answer to the same names: rho, alpha, levels, time, panels.

rho(t) = sqrt((1 - a(t)) / a(t)) is the time in which the probability-flow ODE is plain: with v = x / sqrt(a),
dv / drho = epsilon (DEIS, arXiv:2204.13902, proposition 3). Solvers here integrate in rho; models are called at t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr

from ...errors import UserError

ALPHA_MIN = 1e-7  # the clip of the DEIS authors: keeps rho finite where a schedule ends at pure noise
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


class VariancePreserving:
    """What follows from alpha_bar(t) alone."""

    def levels(self, t) -> tuple[np.ndarray, np.ndarray]:
        """The shares of data and of noise in x_t: sqrt(a), sqrt(1 - a)."""
        a = self.alpha_bar(t)
        return np.sqrt(a), np.sqrt(1 - a)

    def rho(self, t) -> np.ndarray:
        a = self.alpha_bar(t)
        return np.sqrt((1 - a) / a)

    def alpha(self, rho) -> np.ndarray:
        """The share of data at a rho."""
        return (1 + np.square(rho)) ** -0.5


@dataclass(frozen=True)
class DiscreteVP(VariancePreserving):
    """A DDPM schedule of N timesteps; between them alpha_bar is linear in t.

    alphas_cumprod: float64 [N], decreasing. Times run from N - 1 down to `last`, as the DEIS authors have it.
    """

    alphas_cumprod: np.ndarray
    last: float = 0.1
    discrete = True

    @property
    def first(self) -> float:
        return len(self.alphas_cumprod) - 1.0

    def alpha_bar(self, t) -> np.ndarray:
        a = np.interp(t, np.arange(len(self.alphas_cumprod)), self.alphas_cumprod)
        return np.clip(a, ALPHA_MIN, 1 - ALPHA_MIN)

    def time(self, rho) -> np.ndarray:
        """The t of a rho; beyond the schedule, its end."""
        a = self.alphas_cumprod[::-1]
        return np.interp(1 / (1 + np.square(rho)), a, np.arange(len(a))[::-1])

    def panels(self, start: float, end: float) -> np.ndarray:
        """Decreasing times from start to end between which rho is smooth in t."""
        inner = np.arange(np.floor(end) + 1, np.ceil(start))[::-1]
        return np.concatenate([[start], inner, [end]])


@dataclass(frozen=True)
class ContinuousVP(VariancePreserving):
    """The VP-SDE, beta linear in t: a(t) = exp(-t beta_min - t^2 (beta_max - beta_min) / 2); t from 1 to `last`."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    last: float = 1e-3
    first = 1.0
    discrete = False

    def alpha_bar(self, t) -> np.ndarray:
        t = np.asarray(t, np.float64)
        return np.exp(-0.5 * t * t * (self.beta_max - self.beta_min) - t * self.beta_min)

    def time(self, rho) -> np.ndarray:
        log_a, slope = -np.log1p(np.square(rho)), self.beta_max - self.beta_min
        # The root of slope t^2 / 2 + beta_min t + log a = 0, in the form that does not cancel.
        return -2 * log_a / (self.beta_min + np.sqrt(self.beta_min**2 - 2 * slope * log_a))

    def panels(self, start: float, end: float) -> np.ndarray:
        # rho grows like sqrt(t) near 0: panels shrink with t.
        return np.geomspace(start, max(end, 1e-12), 33)


def integrate(schedule, f: Callable[[np.ndarray], np.ndarray], start: float, end: float) -> float:
    """The integral of f(t(rho)) drho between two values of rho, by Gauss-Legendre on panels where t(rho) is smooth.

    Below rho(0) of a discrete schedule f is held at t = 0. 8 nodes a panel reach rounding error.
    """
    edges = schedule.rho(schedule.panels(float(schedule.time(start)), float(schedule.time(end))))
    edges = np.concatenate([[start], edges[1:], [end]])
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    rho = middle[:, None] + half[:, None] * _NODES
    return float((f(schedule.time(rho)) * _WEIGHTS * half[:, None]).sum())


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas [N] shifted and scaled so that the last timestep is pure noise (arXiv:2305.08891, algorithm 1)."""
    return rescale_zero_terminal_snr(torch.from_numpy(betas)).numpy()


def ends_in_noise(betas: np.ndarray) -> bool:
    """Whether the last of betas [N] takes all that was left of the image: zero terminal SNR.

    Small is not zero: the cosine schedule's last beta is 0.999, and models are trained there.
    """
    return bool(abs(betas[-1] - 1) < 1e-4)


def discrete_betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas) -> np.ndarray:
    """float64 [N] betas of a DDPM schedule by diffusers' names."""
    if trained_betas is not None:
        return np.asarray(trained_betas, np.float64)
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
    if beta_schedule == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
    if beta_schedule in ("squaredcos_cap_v2", "cosine"):
        return betas_for_alpha_bar(num_train_timesteps).double().numpy()
    raise UserError(
        f"unknown beta_schedule '{beta_schedule}'; choose linear, scaled_linear, squaredcos_cap_v2 or continuous."
    )
