"""Index of the step that a timestep belongs to, without reading it back from the device."""

from __future__ import annotations

import torch

from ...checks import MOST, whole
from ...errors import UserError
from .evaluations import Evaluation

MOST_STEPS = 1_000_000  # beyond which nobody means what they say


def number_of(steps) -> int:
    """The number of steps that is asked for; one below 1 is told by whoever lays them out. UserError for others."""
    return whole(steps, "num_inference_steps", -MOST, MOST_STEPS)


def single(timestep):
    """The one time that is meant: of a tensor that was expanded over a batch its first entry, a view.

    Raises UserError for a tensor of several entries: all samples are moved at one time.
    """
    if not isinstance(timestep, torch.Tensor) or timestep.numel() == 1:
        return timestep
    if not timestep.numel() or any(s for s, n in zip(timestep.stride(), timestep.shape, strict=True) if n > 1):
        raise UserError(f"step moves all samples at one time: give it one timestep, not {timestep.numel()}.")
    return timestep[(0,) * timestep.ndim]


def own_index(timestep, timesteps: torch.Tensor) -> int | None:
    """The position of `timestep` if it is an entry of `timesteps` itself (a view, as iteration gives), else None.

    Reading the value of a CUDA tensor would make the host wait for all work before it; where the view lies in
    memory is known to the host.
    """
    if not isinstance(timestep, torch.Tensor) or timestep.dtype != timesteps.dtype:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return timestep.storage_offset() - timesteps.storage_offset()


def likely_index(
    timestep, times: list[float], evaluations: list[Evaluation], expected: int | None, begin: int | None
) -> int:
    """The position of a timestep that is a number or a copy; a copy on a device is read only where it must be.

    A time that is not in the grid belongs to the nearest one that is; of two equal ones, a step begins at it.

    Args:
        expected: the position after the one that the sample came from, if that is known.
        begin: the position that a pipeline said it begins at, if it did.
    """
    if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu" and expected is not None:
        return expected
    if expected is None and begin is not None:
        return begin
    value = float(timestep)
    if expected is not None and times[expected] == value:
        return expected
    return min(range(len(times)), key=lambda i: (abs(times[i] - value), not evaluations[i].starts))
