"""What a loop over timesteps asks of a scheduler, whichever family it is of.

diffusers' flow-matching schedulers have no `scale_model_input` and no `init_noise_sigma`: their models take the
sample as it is, and begin at unit noise.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


def set_steps(scheduler, steps: int, device: str | torch.device | None = None) -> None:
    """Set so many timesteps.

    FlowMatchEulerDiscreteScheduler is told its sigmas, from 1 to 1 / steps, as the pipelines of diffusers tell it:
    by itself it would spend the last evaluation at sigma 0.001.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


def model_input(scheduler, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the model is given for a sample [B, ...]: scaled, where the scheduler scales."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def noise_scale(scheduler) -> float | torch.Tensor:
    """What unit noise is multiplied with at the start."""
    return getattr(scheduler, "init_noise_sigma", 1.0)
