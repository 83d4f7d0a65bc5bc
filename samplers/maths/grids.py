"""Timestep grids: n + 1 decreasing times; the model is called at the first n.

linear, quad, cubic: even in t^(1/k), k = 1, 2, 3; log: even in log rho; edm: even in rho^(1/7) (Karras et al.,
arXiv:2206.00364, eq. 5); beta: rho at quantiles of Beta(0.6, 0.6) (arXiv:2407.12173). linspace, leading, trailing:
diffusers' own.
"""

from __future__ import annotations

import numpy as np
from scipy.special import betaincinv

from ...errors import UserError
from .schedule import ContinuousVP, DiscreteVP

POWERS = {"linear": 1, "quad": 2, "cubic": 3}
EDM_POWER = 7
SPACINGS = ("linspace", "leading", "trailing")
EVEN_IN_NOISE = ("log", "edm", "beta")
GRIDS = (*POWERS, *EVEN_IN_NOISE, *SPACINGS)


def make_grid(schedule: DiscreteVP | ContinuousVP, grid: str, num_steps: int, steps_offset: int = 0) -> np.ndarray:
    """float64 [num_steps + 1] decreasing times; whole numbers on a discrete schedule.

    Raises:
        UserError: an unknown grid, no steps, a spacing of diffusers on a continuous schedule, or more steps than
            the schedule has timesteps.
    """
    if grid not in GRIDS:
        raise UserError(f"unknown timestep_grid '{grid}'; choose from {', '.join(GRIDS)}.")
    if num_steps < 1:
        raise UserError(f"num_inference_steps must be 1 or more, not {num_steps}.")
    num_train = int(schedule.first) + 1 if schedule.discrete else None
    if num_train is not None and num_steps >= num_train:
        if num_steps > num_train:
            raise UserError(f"{num_steps} steps are more than the {num_train} timesteps of the schedule.")
        return np.append(np.arange(num_train - 1.0, -1, -1), 0.0)  # each timestep once, whatever the grid
    if grid in SPACINGS:
        if num_train is None:
            raise UserError(f"timestep_grid '{grid}' counts discrete timesteps; choose another for a continuous one.")
        return _spacing(num_train, grid, num_steps, steps_offset)
    first, last = schedule.first, schedule.last
    if grid in POWERS:
        k = POWERS[grid]
        times = np.linspace(first ** (1 / k), last ** (1 / k), num_steps + 1) ** k
    else:
        times = schedule.time(between(grid, schedule.rho(first), schedule.rho(last), num_steps + 1))
        times[0], times[-1] = first, last
    return _whole(times, first) if schedule.discrete else times


def between(grid: str, top: float, bottom: float, number: int, power: float = EDM_POWER) -> np.ndarray:
    """float64 [number] noise levels from top down to bottom: a grid of EVEN_IN_NOISE."""
    if grid == "log":
        return np.geomspace(top, bottom, number)
    if grid == "beta":
        return bottom + (top - bottom) * betaincinv(0.6, 0.6, np.linspace(1, 0, number))
    return np.linspace(top ** (1 / power), bottom ** (1 / power), number) ** power


def _whole(times: np.ndarray, first: float) -> np.ndarray:
    """Truncate as the DEIS authors do (quad and cubic then start at N - 2); equal times move up by one, or down."""
    times = np.floor(times)
    for i in range(len(times) - 2, -1, -1):
        times[i] = max(times[i], times[i + 1] + 1)
    return np.minimum(times, first - np.arange(len(times)))


def _spacing(num_train: int, grid: str, num_steps: int, steps_offset: int) -> np.ndarray:
    """As in diffusers' multistep schedulers, followed by timestep 0, where a last step ends."""
    if grid == "linspace":
        return np.linspace(num_train - 1, 0, num_steps + 1).round()
    if grid == "leading":
        times = np.arange(num_steps, 0, -1.0) * (num_train // (num_steps + 1)) + steps_offset
        times = np.minimum(times, num_train - 1 - np.arange(num_steps))
    else:
        times = np.round(np.arange(num_train, 0, -num_train / num_steps))[:num_steps] - 1
    return np.append(times, 0.0)
