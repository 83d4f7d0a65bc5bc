"""What a pipeline's sampler goes through: its samples and what the model answered, at each of many steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from ...hooks import of_this_thread
from ...interrupts import uninterrupted
from ...pipelines.denoiser import turn_at
from ...pipelines.sampling import call_pipeline, refusals
from ...pipelines.stepping import own_step
from ..choices import FLOW
from ..maths.outputs import without_variance
from ..translation import predicted


class Finished(Exception):
    """Raised after the last step: what a pipeline does then (a VAE, a picture) need not be done."""


@dataclass
class Trajectories:
    """times [T], float; states [T + 1, K, D] from noise to the end; outputs [T, K, D] of the model at states[:T];
    float32, on the pipeline's device. shape: that of one sample. sigmas [T + 1]: noise levels of a flow's states.
    dynamic: whether its shift follows from a mu, which its pipeline works out."""

    times: list[float]
    states: torch.Tensor
    outputs: torch.Tensor
    shape: tuple[int, ...]
    sigmas: list[float] | None = None
    dynamic: bool = False


@contextmanager
def sampled_by(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline with another scheduler; afterwards it has its own."""
    with turn_at(pipe):
        before = pipe.scheduler
        try:
            pipe.scheduler = scheduler
            yield
        finally:
            with uninterrupted():
                pipe.scheduler = before


def run(pipe: Any, scheduler: Any, seeds: Sequence[int], steps: int, options: dict[str, Any], seen: Callable) -> None:
    """Run a pipeline up to its last step.

    Args:
        options: conditioning and pipeline_kwargs, as `ptq4dm.sample` takes them.
        seen: called after each step with (timestep, sample, model's output, result).
    """
    step, taken = scheduler.step, 0

    def watched(model_output, timestep, sample, *args, return_dict=True, **kwargs):
        nonlocal taken
        result = step(model_output, timestep, sample, *args, return_dict=return_dict, **kwargs)
        seen(timestep, sample, model_output, result.prev_sample if return_dict else result[0])
        taken += 1
        if taken == len(scheduler.timesteps):
            raise Finished
        return result

    stepped_through(pipe, scheduler, watched, seeds, steps, options)


def stepped_through(
    pipe: Any, scheduler: Any, step: Callable, seeds: Sequence[int], steps: int, options: dict[str, Any]
) -> None:
    """Run a pipeline whose scheduler has another `step`, which may raise `Finished`.

    Raises UserError where the pipeline does not take the options.
    """
    own = wraps(scheduler.step)(of_this_thread(step, scheduler.step))
    with sampled_by(pipe, scheduler), own_step(scheduler, own), suppress(Finished), refusals(pipe, **options):
        call_pipeline(pipe, seeds, num_inference_steps=steps, **options)


def record(
    pipe: Any, scheduler: Any, seeds: Sequence[int], steps: int, options: dict[str, Any], batch: int
) -> Trajectories:
    """The trajectories of a sampler with so many steps, batch by batch."""
    states, outputs, times = [], [], []
    shape: list[tuple[int, ...]] = []
    for start in range(0, len(seeds), batch):
        these: list[torch.Tensor] = []
        answers: list[torch.Tensor] = []
        times = []

        def seen(t, sample, output, result, these=these, answers=answers, times=times):
            shape.append(tuple(sample.shape[1:]))
            if not these:
                these.append(sample.float().flatten(1))
            times.append(float(t))
            answers.append(without_variance(output, sample).float().flatten(1))
            these.append(result.float().flatten(1))

        run(pipe, scheduler, seeds[start : start + batch], steps, options, seen)
        states.append(torch.stack(these))
        outputs.append(torch.stack(answers))
    levels = getattr(scheduler, "sigmas", None) if predicted(scheduler.config) == FLOW else None
    sigmas = None if levels is None else levels.tolist()
    dynamic = bool(scheduler.config.get("use_dynamic_shifting"))
    return Trajectories(times, torch.cat(states, 1), torch.cat(outputs, 1), shape[0], sigmas, dynamic)
