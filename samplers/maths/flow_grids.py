"""Noise levels of flow-matching: where between noise (1) and data (0) the model is called, counted as in diffusers.

n levels sigma, decreasing; the last step leads from the last of them to 0. In the order of FlowMatchEulerDiscrete-
Scheduler: even levels (or their squares, ...), or those that a pipeline gives; moved towards noise by the model's
shift k, sigma -> k sigma / (1 + (k - 1) sigma) (arXiv:2403.03206, eq. 23); stretched to end at shift_terminal; laid
out anew between their ends by Karras' law, exponentially or by quantiles of Beta(0.6, 0.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from .grids import EVEN_IN_NOISE, POWERS, between

SHIFTS = ("exponential", "linear")
MOST_MU = 100  # some pipelines' is 3 at most; e^100 is 1e43
FLOW_GRIDS = (*POWERS, *EVEN_IN_NOISE)


@dataclass(frozen=True)
class FlowLaw:
    """What a config says of noise levels.

    dynamic: the shift comes with each call, as mu: exp(mu) where `kind` is "exponential", else mu.
    terminal: what the last level is stretched to, before its step to 0.
    """

    shift: float = 1.0
    dynamic: bool = False
    kind: str = "exponential"
    terminal: float | None = None
    trained: int = 1000

    def levels(self, even: np.ndarray, grid: str, mu: float | None) -> np.ndarray:
        """Levels [n] after the shift, for float64 levels [n] before it.

        Args:
            grid: of EVEN_IN_NOISE: laid out anew; any other: left as they are.

        Raises:
            UserError: mu is missing where the shift depends on it, or makes none; a shift that makes levels equal.
        """
        k = self.by(mu)
        sigmas = shifted(even, k)
        if not (np.isfinite(sigmas).all() and (np.diff(sigmas) < 0).all() and sigmas[-1] > 0):
            cause = f"mu {mu:g}" if self.dynamic else f"shift {k:g}"
            raise UserError(f"{cause} moves noise levels to one place, so that no step is left; take another.")
        if self.terminal and len(sigmas) > 1:
            sigmas = 1 - (1 - sigmas) * (1 - self.terminal) / (1 - sigmas[-1])
        return between(grid, sigmas[0], sigmas[-1], len(sigmas)) if grid in EVEN_IN_NOISE else sigmas

    def by(self, mu: float | None) -> float:
        """The shift k. Raises UserError for a mu that is missing, or makes none."""
        if not self.dynamic:
            return self.shift
        if mu is None:
            raise UserError(
                "this model's shift depends on the picture's size (use_dynamic_shifting): pass mu to set_timesteps, "
                "as its pipeline does, or make the scheduler with use_dynamic_shifting=False and a shift."
            )
        if self.kind == "exponential":
            if abs(mu) > MOST_MU:
                raise UserError(
                    f"mu, whose exponential is the shift, must be from -{MOST_MU} to {MOST_MU}; got {mu:g}."
                )
            return math.exp(mu)
        if not mu > 0:
            raise UserError(f"with time_shift_type '{self.kind}' mu must be above 0; got {mu:g}.")
        return mu

    def of_diffusers(self, steps: int) -> np.ndarray:
        """The levels [steps] that FlowMatchEulerDiscreteScheduler starts from where it is given none."""
        least = 1 / self.trained
        return np.linspace(1, least if self.dynamic else float(shifted(np.array(least), self.shift)), steps)


def shifted(sigmas: np.ndarray, k: float) -> np.ndarray:
    with np.errstate(all="ignore"):  # `levels` looks at what comes of it
        return k * sigmas / (1 + (k - 1) * sigmas)


def even_levels(grid: str, steps: int) -> np.ndarray:
    """Levels [steps] from 1 down, even in sigma^(1/k) with k of a grid of POWERS, else even; 0 would be the next."""
    return np.linspace(1, 0, steps + 1)[:-1] ** POWERS.get(grid, 1)


def is_even(sigmas: np.ndarray) -> bool:
    """Whether levels are those that pipelines pass where the user names none: from 1 down to 1 / n."""
    return bool(np.abs(sigmas - even_levels("linear", len(sigmas))).max() < 1e-6)


def check_levels(values, name: str, most: float) -> np.ndarray:
    """float64 [n] from a list. Raises UserError unless it decreases, from `most` at the highest, and ends above 0."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} must be a list of numbers.") from error
    right = found.ndim == 1 and len(found) > 0 and np.isfinite(found).all() and found[0] <= most * (1 + 1e-6)
    if not (right and (np.diff(found) < 0).all() and found[-1] > 0):
        raise UserError(
            f"{name} must be a list of numbers that decrease from {most:g} at most and end above 0 (the last step, "
            "to clean data, is added)."
        )
    return np.minimum(found, most)
