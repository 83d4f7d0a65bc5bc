"""Where sampling may begin in the middle: image to image by `strength`, and a refiner after a base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from ..errors import UserError
from .choices import FLOW
from .maths.evaluations import Evaluation


def check_start(
    index: int, times: Sequence[float], evaluations: list[Evaluation], order: int, num_train: int
) -> None:
    """Raises UserError where nothing is left to sample from evaluation `index` on, or a Runge-Kutta step holds it.

    Args:
        order: evaluations per step.
        num_train: timesteps of a discrete schedule, 0 for a continuous one.
    """
    number = len(evaluations)
    check_left(index, number, number // order)
    if not isinstance(index, int) or not 0 <= index < max(1, number):
        raise UserError(f"begin_index must be from 0 to {number - 1}; got {index!r}.")
    if number and not evaluations[index].starts:
        raise UserError(inside(index, times, evaluations, num_train))


def check_left(index: int, number: int, steps: int) -> None:
    """Raises UserError where evaluation `index` of `number`, in so many steps, is behind the last."""
    if number and index == number:
        raise UserError(
            f"nothing is left to sample: with {steps} steps a strength must be {math.ceil(100 / steps) / 100:g} or "
            "more, and a denoising_start must leave a timestep behind it; ask for more strength, an earlier start or "
            "more steps."
        )


def inside(index: int, times: Sequence[float], evaluations: list[Evaluation], num_train: int) -> str:
    """Why nothing can begin at an evaluation in the middle of a Runge-Kutta step, and where it could."""
    places = []
    for i in range(1, len(times) if num_train else 0):
        cut = math.floor(times[i]) + 1  # base: t >= cut; refiner: t < cut
        if evaluations[i].starts and cut <= times[i - 1]:
            places.append((abs(i - index), 1 - cut / num_train))
    near = f"let base and refiner part at {min(places)[1]:.3g}, or " if places else ""
    return (
        f"timestep {times[index]:g} is inside a Runge-Kutta step, where none can begin: "
        f"{near}take a solver with one evaluation a step, such as 't_ab'."
    )


def beside_strength(index: int, times: Sequence[float], first: float, grid: str) -> str | None:
    """What to say where evaluation `index` is not at the time that a `strength` leading there means to diffusers.

    Args:
        first: the time of pure noise.
    """
    if not index:
        return None
    strength, begins = 1 - index / len(times), times[index] / first
    if abs(begins - strength) <= 0.05:
        return None
    return (
        f"the timesteps of grid '{grid}' from number {index} on begin at {begins:.0%} of the schedule; where this is "
        f"a strength of {strength:.2g}, take timestep_grid='linear' to begin at {strength:.0%} as with diffusers' "
        "samplers."
    )


class Beginning:
    """Of a DEISScheduler: where in its timesteps a pipeline says that it begins."""

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where in `timesteps` the first step will be, for pipelines that start in the middle (img2img).

        It counts only where a timestep is not an entry of `timesteps` itself, which tells its own place. A warning
        says so where the timestep there is not the one that `strength` means to diffusers.

        Raises:
            UserError: nothing is left to sample there, or it is inside a Runge-Kutta step.
        """
        check_start(begin_index, self._times, self._evaluations, self.order, self._num_discrete)
        noise = self.config.num_train_timesteps if self.config.prediction_type == FLOW else self.schedule.first
        warning = beside_strength(begin_index, self._times, noise, self._choice.grid)
        if warning and not self._choice.of_diffusers:
            warnings.warn(warning, stacklevel=2)
        self._begin_index = begin_index
