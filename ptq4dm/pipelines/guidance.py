"""Guidance in an interval of timesteps, and none elsewhere: there one forward pass of the rows with a condition.

Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models", arXiv:2404.07724. A pipeline's own loop is left as it is. Outside of the interval the denoiser computes the
conditional prediction c alone and answers it for the unconditional one u, too, so that the pipeline's
u + w (c - u) is c. Which is which is found out beforehand, by a look at the first two steps of a run: which of the
predictions counts for more than the whole, and that c comes out where u is c.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..checks import check
from ..errors import UserError
from ..hooks import computing, input_of
from .denoiser import denoiser_names
from .stepping import own_step

UNKNOWN = "ptq4dm does not know how {} guides, so guidance_interval must be left out"
NOT_LINEAR = 0.5  # the share of what goes to the scheduler that may be no sum of the two predictions: some rescale it
INEXACT = 0.02  # that by which it may miss the conditional prediction where that stands for both, by rounding


class Finished(Exception):
    """Raised after the last step of a look."""


@dataclass(frozen=True)
class Way:
    """How a pipeline guides.

    together: both predictions come from one call, as halves of its rows; else from two calls a step.
    conditional: which half, or which call, has the condition: 0 or 1.
    sign: -1 where the pipeline turns predictions around before the scheduler gets them.
    times: what the scheduler is given at each step.
    """

    together: bool
    conditional: int
    sign: int = 1
    times: tuple[float, ...] = ()


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
    seen, step = _Seen(pipe), pipe.scheduler.step

    @wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        output, timestep, *_ = inspect.signature(step).bind(*args, **kwargs).arguments.values()
        seen.stepped(output, timestep)
        if len(seen.times) == len(pipe.scheduler.timesteps):
            raise Finished
        return step(*args, **kwargs)

    with _computing(pipe, seen.computed), own_step(pipe.scheduler, watched), suppress(Finished):
        run()
    if seen.way is None:
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
    return replace(seen.way, times=tuple(seen.times))


LOOKS: WeakKeyDictionary[Any, tuple[list, tuple, Way]] = WeakKeyDictionary()
"""pipeline -> (its scheduler and denoisers, what decided how it guides, how it does) of the last look."""


def way_of(pipe: Any, run: Callable[[], Any], *arguments: Any) -> Way:
    """As `look`; a pipeline that is called with the same arguments again, as for one batch after another, is not
    looked at again. arguments: of the run, but for seeds; of tensors the form counts, not the values."""
    parts = [pipe.scheduler, *(getattr(pipe, name) for name in denoiser_names(pipe))]
    key = repr(sorted(dict(pipe.scheduler.config).items())), repr(_mapped(arguments, _form))
    before = LOOKS.get(pipe)
    if before and before[1] == key and all(map(operator.is_, before[0], parts)):
        return before[2]
    way = look(pipe, run)
    LOOKS[pipe] = parts, key, way
    return way


def _form(tensor: torch.Tensor) -> Any:
    return tuple(tensor.shape), tensor.dtype


class _Seen:
    """What comes to light while a pipeline runs: its first step as it is, its second without guidance."""

    def __init__(self, pipe: Any):
        self.pipe, self.called = pipe, 0
        self.answers: list[Any] = []  # of the calls of the first step; later steps are given them again
        self.right: torch.Tensor | None = None  # what the second step must come to
        self.times: list[float] = []
        self.way: Way | None = None

    def computed(self, forward: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        self.called += 1
        if self.way is None:
            self.answers.append(forward(*args, **kwargs))
            return self.answers[-1]
        if len(self.times) > 1:
            return self.answers[(self.called - 1) % len(self.answers)]
        if not self.way.together:
            return self.answers[self.way.conditional]
        apart = f"{UNKNOWN.format(type(self.pipe).__name__)}: its rows are not computed each by itself."
        try:
            output = conditional_alone(forward, self.way, args, kwargs)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(apart) from error
        self.right = prediction(output, self.pipe).chunk(2)[0]
        whole = prediction(forward(*args, **kwargs), self.pipe).chunk(2)[self.way.conditional]
        if whole.shape != self.right.shape or (whole - self.right).norm() > INEXACT * whole.norm():
            raise UserError(apart)
        return output

    def stepped(self, output: torch.Tensor, timestep: Any) -> None:
        found = once(output)
        if self.way is None:
            kept = [prediction(answer, self.pipe) for answer in self.answers]
            self.way = _way(self.pipe, kept, found)
            self.right = None if self.way.together else kept[self.way.conditional]
        elif len(self.times) == 1:
            right = None if self.right is None else self.way.sign * fitting(self.right, found, self.pipe)
            if right is None or (found - right).norm() > INEXACT * right.norm():
                raise UserError(f"{UNKNOWN.format(type(self.pipe).__name__)}.")
        self.times.append(float(torch.as_tensor(timestep).flatten()[0]))
        self.called = 0


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
    conditional = 0 if abs(a) > abs(b) else 1  # w and 1 - w, with w above 1
    if not together and conditional == 1:
        raise UserError(
            f"{UNKNOWN.format(type(pipe).__name__)}: it asks for the prediction without the condition first."
        )
    return Way(together, conditional, 1 if a + b > 0 else -1)


@contextmanager
def guided_within(pipe: Any, way: Way, interval: tuple[float, float]) -> Iterator[None]:
    """Guidance where low <= time <= high alone, times as shares of the schedule: 1 is noise, 0 data."""
    low, high = interval
    total = pipe.scheduler.config.num_train_timesteps if max(way.times) > 1 else 1.0
    guided = [low <= t / total <= high for t in way.times]
    step, taken = pipe.scheduler.step, 0
    kept: list[Any] = []

    @wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        kept.clear()
        return step(*args, **kwargs)

    def computed(forward: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        if guided[taken]:
            return forward(*args, **kwargs)
        if way.together:
            return conditional_alone(forward, way, args, kwargs)
        if not kept:
            kept.append(forward(*args, **kwargs))
        return kept[0]

    with _computing(pipe, computed), own_step(pipe.scheduler, watched):
        yield


@contextmanager
def _computing(pipe: Any, computed: Callable) -> Iterator[None]:
    """All denoisers of a pipeline answer by computed(their own forward, args, kwargs)."""

    def instead(forward: Callable) -> Callable:
        @wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            return computed(forward, args, kwargs)

        return called

    with ExitStack() as stack:
        for name in denoiser_names(pipe):
            network = getattr(pipe, name)
            stack.enter_context(computing(network, {"": instead(network.forward)}))
        yield


def prediction(output: Any, pipe: Any) -> torch.Tensor:
    """The tensor in what a denoiser returned. Raises UserError where it returned no such."""
    found = output[0] if isinstance(output, (tuple, list, Mapping)) and len(output) else output
    if isinstance(output, Mapping):
        found = next(iter(output.values()))
    if not isinstance(found, torch.Tensor):
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
    return found


def once(output: torch.Tensor) -> torch.Tensor:
    """What goes to the scheduler [B, ...]; of one that comes twice, as DiTPipeline has it, the first half."""
    first, *rest = output.chunk(2)
    return first if rest and torch.equal(first, rest[0]) else output


def fitting(part: torch.Tensor, output: torch.Tensor, pipe: Any) -> torch.Tensor:
    """A prediction [B, C, ...] without the variance behind it, in the dtype of what went to the scheduler."""
    if part.ndim == output.ndim and part.ndim > 1:
        part = part[:, : output.shape[1]]
    if part.shape != output.shape:
        raise UserError(f"{UNKNOWN.format(type(pipe).__name__)}.")
    return part.to(output.dtype)


def conditional_alone(forward: Callable, way: Way, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The output for the conditional half of all rows, twice."""
    rows = len(input_of(args, kwargs))

    def half(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(2)[way.conditional] if tensor.ndim and len(tensor) == rows else tensor

    output = forward(*_mapped(args, half), **_mapped(dict(kwargs), half))
    return _mapped(output, lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {name: _mapped(one, change) for name, one in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_mapped(one, change) for one in value)
    return value
