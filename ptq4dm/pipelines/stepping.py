"""What a loop over timesteps asks of a scheduler, whichever family it is of.

diffusers' flow-matching schedulers have no `scale_model_input` and no `init_noise_sigma`: their models take the
sample as it is, and begin at unit noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..errors import UserError
from ..interrupts import uninterrupted


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


@contextmanager
def own_step(scheduler, step: Callable) -> Iterator[None]:
    """Let `scheduler.step` be another function, of this one scheduler; afterwards it is what it was."""
    before = vars(scheduler).get("step")
    try:
        scheduler.step = step
        yield
    finally:
        with uninterrupted():
            vars(scheduler).pop("step", None)
            if before is not None:
                scheduler.step = before


@contextmanager
def scheduler_fit(pipe) -> Iterator[None]:
    """Let stock DDPMPipeline run with any scheduler that starts from unit noise.

    DDPMPipeline passes generator= to scheduler.step, which deterministic solvers (DEIS, UniPC, ...) do not
    take, and it never calls scale_model_input, so sigma-space schedulers (Euler, Heun, EDM) would silently
    give wrong pictures: those are refused.
    """
    from diffusers import DDPMPipeline

    if not isinstance(pipe, DDPMPipeline):
        yield
        return
    scheduler = pipe.scheduler
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise UserError(
            f"{type(pipe).__name__} does not scale its input as {type(scheduler).__name__} needs; "
            "use a sampler that starts from unit noise, such as deis, ddim or diffusers/unipc."
        )
    if "generator" in inspect.signature(scheduler.step).parameters:
        yield
        return
    step = scheduler.step
    with own_step(scheduler, lambda *a, generator=None, **k: step(*a, **k)):
        yield
