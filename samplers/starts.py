"""Where sampling may begin in the middle: image to image by `strength`, and a refiner after a base."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import UserError
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
