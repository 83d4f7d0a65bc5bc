"""Scale and weights of each step, by least squares, on the states that the few steps themselves come to.

All trajectories go through the few evaluations together. After each the step is fitted to the teacher's state at
the next time, from the state and the outputs that are there: so what earlier steps, or a quantized model, did wrong
is put right as far as a scale and weights can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..fitted import FittedScheduler, Row
from .trajectories import Trajectories, run


class Fitting(FittedScheduler):
    """A FittedScheduler whose table is made while it steps.

    Args (beside the scheduler's own; set by `fit_weights`):
        teacher, places: its times and states at these places [n + 1] are gone through; rows: the trajectories that
        are fitted to, the others only follow; history: outputs that a step weighs; jitter: see `solve`.
    """

    def prepare(self, teacher: Trajectories, places: Sequence[int], rows: slice, history: int, jitter: float) -> None:
        self.times = [teacher.times[place] for place in places[:-1]]
        self.levels = None if teacher.sigmas is None else [teacher.sigmas[place] for place in places]
        self.targets = [teacher.states[place] for place in places[1:]]
        self.rows, self.history, self.jitter = rows, history, jitter
        self.dynamic, self.given = teacher.dynamic, {}

    def _table(self, steps: int) -> tuple[Sequence[float], list[Row], Sequence[float] | None]:
        return self.times, [], self.levels

    def _look_at(self, steps: int, given: dict[str, Any]) -> None:
        self.given = {name: value for name, value in given.items() if name != "mu" or self.dynamic}

    def _kept(self, index: int) -> int:
        return min(index, self.history - 1)

    def _moved(self, index: int, x: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        given = [part.flatten(1)[self.rows] for part in (x, *outputs)]
        scale, *weights = solve(given, self.targets[index][self.rows], self.jitter)
        self._rows.append((scale, weights))
        return super()._moved(index, x, outputs)


def solve(given: list[torch.Tensor], target: torch.Tensor, jitter: float) -> list[float]:
    """The factors of tensors [K, D] whose sum comes nearest to `target`, in float64.

    jitter: the share of each but the first that is taken for its error, independent of all else: so weights do not
    grow that cancel one another.
    """
    stack = torch.stack([one.flatten().double() for one in given])
    gram, right = stack @ stack.T, stack @ target.flatten().double()
    gram[1:, 1:] += jitter**2 * torch.diag(gram.diagonal()[1:])
    return torch.linalg.solve(gram.cpu(), right.cpu()).tolist()


def fit_weights(
    pipe: Any,
    teacher: Trajectories,
    places: Sequence[int],
    seeds: Sequence[int],
    options: dict[str, Any],
    facts: dict[str, Any],
    rows: slice,
    history: int,
    jitter: float,
) -> tuple[dict[str, Any], torch.Tensor]:
    """(a table of FittedScheduler, the end states [K, D]) for a grid of places in the teacher's times.

    Args:
        pipe: the pipeline that is fitted to the teacher: its own, or a quantized one.
        seeds: of the teacher's trajectories, all of them, in one batch.
        facts: of the model: prediction_type, num_train_timesteps, start.
        rows: the trajectories that are fitted to.
    """
    scheduler, ends = Fitting(**facts), []
    scheduler.prepare(teacher, places, rows, history, jitter)
    run(pipe, scheduler, seeds, len(places) - 1, options, lambda t, x, y, result: ends.append(result))
    table = {
        "timesteps": scheduler.times,
        "scale": [scale for scale, _ in scheduler._rows],
        "weights": [weights for _, weights in scheduler._rows],
    }
    if scheduler.levels is not None:
        table["sigmas"] = scheduler.levels
    if scheduler.given:
        table["given"] = scheduler.given
    return table, ends[-1].float().flatten(1)
