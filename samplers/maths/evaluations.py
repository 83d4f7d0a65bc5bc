"""The table that a DEIS scheduler steps through: one line for each call of the model, worked out before the first.

    x' = scale * base + sum_j weights[j] * g_j

With v = x / alpha a solver moves v from rho to rho' by weights in drho (coefficients.py); scale and weights here are
those of x itself, and g is epsilon. For flow-matching models, where alpha may be 0, velocities.py has other ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .coefficients import RUNGE_KUTTA, Tableau
from .paths import Schedule


@dataclass(frozen=True)
class Evaluation:
    """One call of the model and the update after it: x' = scale * base + sum_j weights[j] * g_j, newest first.

    `base` is the sample at which the step began: this one where `starts` (always so in multistep methods), else
    an earlier one of a Runge-Kutta step. weights[k] are for k earlier evaluations; the first `said` of each are for
    what this one says (two where velocity and epsilon count apart).
    """

    alpha: float  # the share of data in the sample that the model sees
    sigma: float  # that of noise
    starts: bool
    scale: float
    weights: tuple[tuple[float, ...], ...]
    said: int = 1

    @property
    def past(self) -> int:
        """How many earlier evaluations count at most."""
        return len(self.weights[-1]) - self.said

    def moved(
        self, base: torch.Tensor, said: tuple[torch.Tensor, ...], past: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """x', of the shape of `base`, from what the model says now and what it said before, the latest first."""
        weights = self.weights[min(len(past), len(self.weights) - 1)]
        result = base * self.scale
        for weight, one in zip(weights, (*said, *past), strict=False):
            result.add_(one, alpha=weight)
        return result


# (where the model is called, start and end of the step, whether it starts there, weights by length of history)
Row = Callable[[float, float, float, bool, list[np.ndarray]], Evaluation]


def multistep(table: list[list[np.ndarray]], levels: np.ndarray, row: Row) -> list[Evaluation]:
    """Evaluation i leads from levels[i] to levels[i + 1]; its weights are in table[i], by the history's length."""
    return [
        row(start, start, end, True, weights) for start, end, weights in zip(levels, levels[1:], table, strict=False)
    ]


def runge_kutta(
    method: str, levels: np.ndarray, row: Row, time: Callable, starts: np.ndarray, ends_inside: bool = False
) -> tuple[list[float], list[Evaluation]]:
    """Stage s of a step of length h is at start + c_s h; its update leads to the next one, the last to the end.

    Args:
        levels: in which the method integrates: rho, or sigma of a flow; float64 [n + 1].
        time: of the stages that lie between.
        starts: times of the levels.
        ends_inside: a last step to level 0 has stages, too, those of `inside`; otherwise it is Euler's.
    """
    nodes, matrix, final = RUNGE_KUTTA[method]
    all_times, rows = [], []
    for i, (start, end) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if end == 0.0:  # no stage where no noise is left
            nodes, matrix, final = inside(method) if ends_inside else RUNGE_KUTTA["1euler"]
        h, stages = end - start, [start + c * (end - start) for c in nodes]
        stage_times = [starts[i], *time(np.array(stages[1:]))]
        for s, (at, t) in enumerate(zip(stages, stage_times, strict=True)):
            weights = np.array(matrix[s + 1] if s + 1 < len(nodes) else final, np.float64)
            target = stages[s + 1] if s + 1 < len(nodes) else end
            all_times.append(float(t))
            rows.append(row(at, start, target, s == 0, [h * weights[::-1]]))
    return all_times, rows


def inside(method: str) -> Tableau:
    """The stages of one step of a method, or, where it has one at the end of its step, of another that has none.

    One step alone may be of one order less than the others and leaves theirs to the whole: so Heun's of order 3 takes
    the place of Kutta's and of the classical one of order 4, and Euler's that of Heun's of order 2, as in diffusers.
    """
    nodes = RUNGE_KUTTA[method][0]
    return RUNGE_KUTTA[method if nodes[-1] < 1 else "3heun" if len(nodes) > 2 else "1euler"]


def row_in_rho(schedule: Schedule) -> Row:
    """Evaluations at finite rho, from weights in drho for epsilon."""

    def row(at: float, start: float, end: float, starts: bool, weights: list[np.ndarray]) -> Evaluation:
        alpha, alpha_start, alpha_end = (float(schedule.alpha(rho)) for rho in (at, start, end))
        scaled = tuple(tuple(float(alpha_end * w) for w in some) for some in weights)
        return Evaluation(alpha, float(at * alpha), starts, alpha_end / alpha_start, scaled)

    return row
