"""Ways from data to noise, x = alpha x_0 + sigma n, along which other models than DDPM's were trained; in float64.

Both answer to the names of a noise schedule (schedule.py): the probability-flow ODE is d(x / alpha) / d rho = epsilon
on every such path, with rho = sigma / alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .schedule import ContinuousVP, DiscreteVP


@dataclass(frozen=True)
class Flow:
    """Flow matching, also called rectified flow: x = (1 - s) x_0 + s n (arXiv:2209.03003, arXiv:2210.02747).

    The time is s itself, from 1 to 0. Models predict the velocity v = dx / ds = n - x_0. At s = 1, where alpha = 0,
    rho is infinite.
    """

    first = 1.0
    last = 0.0
    discrete = False

    def levels(self, t) -> tuple[np.ndarray, np.ndarray]:
        """The shares of data and of noise: 1 - s, s."""
        s = np.asarray(t, np.float64)
        return 1 - s, s

    def rho(self, t) -> np.ndarray:
        with np.errstate(divide="ignore"):
            s = np.asarray(t, np.float64)
            return s / (1 - s)

    def alpha(self, rho) -> np.ndarray:
        return 1 / (1 + np.asarray(rho, np.float64))

    def time(self, rho) -> np.ndarray:
        return 1 - self.alpha(rho)

    def panels(self, start: float, end: float) -> np.ndarray:
        """Decreasing times from start < 1 to end; 1 + rho = 1 / (1 - s) shrinks by the same share each time."""
        return 1 - 1 / np.geomspace(1 / (1 - start), 1 / (1 - end), 17)


@dataclass(frozen=True)
class EDM:
    """Karras et al., arXiv:2206.00364: x = x_0 + sigma n. The time is log(sigma) / 4, as models are told it."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    discrete = False

    @property
    def first(self) -> float:
        return float(self.time(self.sigma_max))

    @property
    def last(self) -> float:
        return float(self.time(self.sigma_min))

    def levels(self, t) -> tuple[np.ndarray, np.ndarray]:
        sigma = self.rho(t)
        return np.ones_like(sigma), sigma

    def rho(self, t) -> np.ndarray:
        return np.exp(4 * np.asarray(t, np.float64))

    def alpha(self, rho) -> np.ndarray:
        return np.ones_like(np.asarray(rho, np.float64))

    def time(self, rho) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(rho) / 4


Schedule = DiscreteVP | ContinuousVP | Flow | EDM


def alpha_sigma(schedule: Schedule, times: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`shares` at times [B] of a schedule."""
    return shares(*schedule.levels(times.double().cpu().numpy()), like)


def shares(alpha: np.ndarray, sigma: np.ndarray, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares [B] of data and of noise as [B, 1, ...] that broadcast over `like`, in its dtype and place."""
    shape = (-1, *[1] * (like.ndim - 1))
    a, b = (torch.from_numpy(np.asarray(one)).to(like.device).reshape(shape).to(like.dtype) for one in (alpha, sigma))
    return a, b
