"""The table that a DEIS scheduler steps through: one line for each call of the model, worked out before the first.

    x' = scale * base + sum_j weights[j] * eps_j

With v = x / sqrt(a) a solver moves v from rho to rho' by weights in drho (coefficients.py); scale and weights here
are those of x itself, with alpha = sqrt(a) = 1 / sqrt(1 + rho^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .coefficients import RUNGE_KUTTA
from .schedule import Schedule


@dataclass(frozen=True)
class Evaluation:
    """One call of the model and the update after it: x' = scale * base + sum_j weights[j] * eps_j, newest first.

    `base` is the sample at which the step began: this one where `starts` (always so in multistep methods), else
    an earlier one of a Runge-Kutta step. weights[k] are for a history of k + 1 evaluations.
    """

    alpha: float  # sqrt(alpha_bar)
    sigma: float  # sqrt(1 - alpha_bar)
    starts: bool
    scale: float
    weights: tuple[tuple[float, ...], ...]

    def moved(self, base: torch.Tensor, history: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """x', of the shape of `base`; noise predictions in `history`, the latest first."""
        weights = self.weights[min(len(history), len(self.weights)) - 1]
        result = base * self.scale
        for weight, eps in zip(weights, history, strict=False):
            result.add_(eps, alpha=weight)
        return result


def multistep(table: list[list[np.ndarray]], rho: np.ndarray, lower_order_final: bool) -> list[Evaluation]:
    """Evaluation i leads from rho[i] to rho[i + 1]; its weights are in table[i], by the length of the history.

    lower_order_final: the last ones look back no further than there are steps left.
    """
    left = range(len(table), 0, -1)
    table = [weights[:n] for weights, n in zip(table, left, strict=True)] if lower_order_final else table
    return [
        _evaluation(start, start, end, True, weights)
        for start, end, weights in zip(rho, rho[1:], table, strict=False)
    ]


def runge_kutta(
    method: str, schedule: Schedule, times: np.ndarray, rho: np.ndarray
) -> tuple[list[float], list[Evaluation]]:
    """Stage s of a step of length h is at rho + c_s h; its update leads to the next one, the last to the end."""
    nodes, matrix, final = RUNGE_KUTTA[method]
    all_times, rows = [], []
    for i, (start, end) in enumerate(zip(rho[:-1], rho[1:], strict=True)):
        if end == 0.0:  # a stage at rho = 0 would be outside the model's training: one Euler step
            all_times.append(times[i])
            rows.append(_evaluation(start, start, end, True, [np.array([end - start])]))
            break
        h, stages = end - start, [start + c * (end - start) for c in nodes]
        stage_times = [times[i], *schedule.time(np.array(stages[1:]))]
        for s, (at, t) in enumerate(zip(stages, stage_times, strict=True)):
            row = np.array(matrix[s + 1] if s + 1 < len(nodes) else final, np.float64)
            target = stages[s + 1] if s + 1 < len(nodes) else end
            all_times.append(float(t))
            rows.append(_evaluation(at, start, target, s == 0, [h * row[::-1]]))
    return all_times, rows


def _evaluation(at: float, start: float, end: float, starts: bool, weights: list[np.ndarray]) -> Evaluation:
    """At rho `at`, in a step that began at rho `start`: the update to rho `end`, from weights in drho."""
    alpha, alpha_end = (1 + at**2) ** -0.5, (1 + end**2) ** -0.5
    scaled = tuple(tuple(float(alpha_end * w) for w in row) for row in weights)
    return Evaluation(float(alpha), float(at * alpha), starts, float(alpha_end * (1 + start**2) ** 0.5), scaled)
