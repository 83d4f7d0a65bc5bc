"""Guidance in an interval of timesteps, and none elsewhere: there one forward pass of the rows with a condition.

Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models", arXiv:2404.07724. A pipeline's own loop is left as it is. Outside of the interval the denoiser computes the
conditional prediction c alone and answers it for the unconditional one u, too, so that the pipeline's
u + w (c - u) is c. Which is which is found out beforehand, by a look at the first two steps of a run: which of the
predictions counts for more than the whole, and that c comes out where u is c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..checks import check
from ..errors import UserError
from ..hooks import computing, input_of
from .denoiser import denoiser, denoiser_names
from .stepping import own_step

UNKNOWN = "ptq4dm does not know how {} guides, so guidance_interval must be left out"
NOT_LINEAR = 0.2  # the share of what goes to the scheduler that may be no sum of the two predictions


class Finished(Exception):
    """Raised after the last step of a look."""


@dataclass
class Way:
    """How a pipeline guides.

    together: both predictions come from one call, as halves of its rows; else from two calls a step.
    conditional: which half, or which call, has the condition: 0 or 1.
    times: what the scheduler is given at each step.
    """

    together: bool
    conditional: int
    times: list[float] = field(default_factory=list)


def check_interval(value: Any) -> tuple[float, float]:
    """(low, high). Raises UserError unless these are two numbers from 0 to 1, the lower first."""
    try:
        low, high = value
    except (TypeError, ValueError):
        raise UserError("guidance_interval must be two numbers, the lower first, such as (0.1, 0.8).") from None
    for one in (low, high):
        check(one, float, "guidance_interval", 0, 1)
    if not low < high:
        raise UserError(f"guidance_interval must be two numbers, the lower first; got {low} and {high}.")
    return float(low), float(high)


def look(pipe: Any, run: Callable[[], Any]) -> Way:
    """How a pipeline guides, from two steps of a run; the others are gone through without the denoiser.

    Args:
        run: calls the pipeline.

    Raises:
        UserError: no guidance in these arguments, or one of a kind that is not known.
    """
    network, step, forward = denoiser(pipe), pipe.scheduler.step, denoiser(pipe).forward
    kept: list[torch.Tensor] = []  # what the first step's calls gave
    answers: list[Any] = []
    expected: list[torch.Tensor] = []
    way: list[Way] = []
    times: list[float] = []
    called = 0

    def computed(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        if not times:
            answers.append(forward(*args, **kwargs))
            kept.append(prediction(answers[-1], pipe))
            return answers[-1]
        if len(times) == 1 and way[0].together:
            output = doubled(forward(*halved(args, way[0], args, kwargs), **halved(kwargs, way[0], args, kwargs)))
            expected.append(prediction(output, pipe).chunk(2)[0])
            return output
        return answers[way[0].conditional if len(times) == 1 else (called - 1) % len(answers)]

    def watched(output: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal called
        if not times:
            way.append(_way(pipe, kept, output))
            expected.extend([] if way[0].together else [kept[way[0].conditional]])
        elif len(times) == 1 and not torch.allclose(output, fitting(expected[0], output, pipe), rtol=0.05, atol=0.02):
            raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
        times.append(float(timestep))
        called = 0
        if len(times) == len(pipe.scheduler.timesteps):
            raise Finished
        return step(output, timestep, *args, **kwargs)

    with computing(network, {"": computed}), own_step(pipe.scheduler, watched), suppress(Finished):
        run()
    if not way:
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
    way[0].times = times
    return way[0]


def _way(pipe: Any, kept: list[torch.Tensor], output: torch.Tensor) -> Way:
    """From the predictions of a step's calls, and what of them went to the scheduler."""
    together = len(kept) == 1 and len(kept[0]) == 2 * len(output)
    if len(kept) == 1 and not together:
        raise UserError(
            f"{type(pipe).__name__} does not guide with these arguments: give a guidance_scale above 1 beside "
            "guidance_interval, and where it takes one a negative prompt."
        )
    if len(kept) > 2:
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}: it calls its denoiser {len(kept)} times a step.")
    parts = list(kept[0].chunk(2)) if together else kept
    first, second = (fitting(part, output, pipe).double().flatten() for part in parts)
    pair, whole = torch.stack([first, second], 1).cpu(), output.double().flatten().cpu()
    a, b = torch.linalg.lstsq(pair, whole).solution.tolist()
    left = (whole - pair @ torch.tensor([a, b], dtype=whole.dtype)).norm() / whole.norm()
    if not (left < NOT_LINEAR and a * b < 0):
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
    conditional = 0 if a > b else 1
    if not together and conditional == 1:
        raise UserError(
            f"{UNKNOWN.format(type(pipe).__name__)}: it asks for the prediction without the condition first."
        )
    return Way(together, conditional)


@contextmanager
def guided_within(pipe: Any, way: Way, interval: tuple[float, float]) -> Iterator[None]:
    """Guidance where low <= time <= high alone, times as shares of the schedule: 1 is noise, 0 data."""
    low, high = interval
    total = pipe.scheduler.config.num_train_timesteps if max(way.times) > 1 else 1.0
    guided = [low <= t / total <= high for t in way.times]
    step, taken, kept = pipe.scheduler.step, 0, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        kept.clear()
        return step(*args, **kwargs)

    def instead(forward: Callable) -> Callable:
        def computed(*args: Any, **kwargs: Any) -> Any:
            if guided[taken]:
                return forward(*args, **kwargs)
            if way.together:
                return doubled(forward(*halved(args, way, args, kwargs), **halved(kwargs, way, args, kwargs)))
            if not kept:
                kept.append(forward(*args, **kwargs))
            return kept[0]

        return computed

    with ExitStack() as stack:
        for name in denoiser_names(pipe):
            network: nn.Module = getattr(pipe, name)
            stack.enter_context(computing(network, {"": instead(network.forward)}))
        stack.enter_context(own_step(pipe.scheduler, watched))
        yield


def prediction(output: Any, pipe: Any) -> torch.Tensor:
    """The tensor in what a denoiser returned. Raises UserError where it returned no such."""
    found = output[0] if isinstance(output, (tuple, list, Mapping)) and len(output) else output
    if isinstance(output, Mapping):
        found = next(iter(output.values()))
    if not isinstance(found, torch.Tensor):
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
    return found


def fitting(part: torch.Tensor, output: torch.Tensor, pipe: Any) -> torch.Tensor:
    """A prediction [B, C, ...] without the variance behind it, in the dtype of what went to the scheduler."""
    if part.ndim == output.ndim and part.ndim > 1:
        part = part[:, : output.shape[1]]
    if part.shape != output.shape:
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
    return part.to(output.dtype)


def halved(value: Any, way: Way, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The same arguments with the conditional half of all rows."""
    rows = len(input_of(args, kwargs))
    return _mapped(value, lambda t: t.chunk(2)[way.conditional] if t.ndim and len(t) == rows else t)


def doubled(output: Any) -> Any:
    """The same output with all rows twice."""
    return _mapped(output, lambda t: torch.cat([t, t]) if t.ndim else t)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {name: _mapped(one, change) for name, one in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_mapped(one, change) for one in value)
    return value
