"""Index of the step that a timestep belongs to, without reading it back from the device."""

from __future__ import annotations

import torch


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
