"""What time it is in a sampler: the range of its scheduler, the times that its model sees, and its steps.

Models are called with the scheduler's times, with times in [0, 1], or with either counted from the data (Mochi,
Z-Image); schedulers count thousandths, shares, or logarithms of sigma (EDM). Which it is, the first call shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..hooks import of_this_thread
from ..pipelines.denoiser import schedulers_of
from ..pipelines.stepping import own_step

NEAR = 0.005  # of a time: what rounding to bfloat16 changes


@dataclass(frozen=True)
class Span:
    """The range of a scheduler's times, from data to pure noise. counts: they are whole numbers up to high - 1."""

    low: float
    high: float
    counts: bool = False

    def share(self, time: float | Tensor) -> Any:
        """Where times lie in the range, in [0, 1]."""
        share = (torch.as_tensor(time, dtype=torch.float64) - self.low) / (self.high - self.low)
        return share.clamp(0, 1)

    def time(self, share: Tensor) -> Tensor:
        """The times at shares of the range."""
        return share * (self.high - self.low) + self.low


def span_of(scheduler: Any, grid: Tensor) -> Span:
    """The range of a scheduler's times: what it has before steps are chosen, (0, T) where it counts to T.

    grid: the times that it samples at. A scheduler that samples on another scale than it begins with, or begins with
    none, is taken to go from 0, or its least time, to its largest.
    """
    counted = scheduler.config.get("num_train_timesteps")
    try:
        whole = type(scheduler).from_config(scheduler.config).timesteps.double()
        low, high = float(whole.min()), float(whole.max())
    except (AttributeError, RuntimeError, ValueError, TypeError, UserError):  # it has no times yet
        low, high = (0.0, float(counted)) if counted else (0.0, 0.0)
    top = float(grid.max())
    if top > 0 and (high <= low or top < 0.01 * high or top > 1.01 * high):  # another scale
        low, high = min(0.0, float(grid.min())), top
    if counted and low >= 0 and abs(high - counted) <= 1:
        return Span(0.0, float(counted), True)
    return Span(low, high) if high > low else Span(low, low + 1)


@dataclass(frozen=True)
class _Reading:
    """How a model's time becomes the scheduler's: scale * t + offset."""

    scale: float
    offset: float

    def __call__(self, time: float) -> float:
        return self.scale * time + self.offset

    def near(self, time: float, there: float, size: float) -> bool:
        """Whether a model's time is, but for its rounding, a time of the scheduler, whose range has this size."""
        return abs(self(time) - there) <= NEAR * max(abs(self(time)), abs(there), 1e-3 * size)


def _readings(time: float, grid: Tensor, span: Span, begin: int) -> tuple[list[_Reading], int]:
    """(how a model's times may be read, the entry of the grid that its first call is at); [] if no way fits."""
    size = span.high - span.low
    same, unit = _Reading(1.0, 0.0), _Reading(size, span.low)
    turned, unit_turned = _Reading(-1.0, span.high), _Reading(-size, span.high)
    ways = [[same, unit], [turned, unit_turned]]
    for readings, anywhere in ((ways[0], False), (ways[0], True), (ways[1], False)):
        for reading in readings:
            index = int((grid - reading(time)).abs().argmin()) if anywhere else begin
            found = [one for one in readings if one.near(time, float(grid[index]), size)]
            if found:
                return found, index
    return [], begin


class Track:
    """One scheduler while its pipeline samples: which of its steps the model is called at.

    A step begins with the first call of a model after the scheduler has stepped, or with a call at another time.
    grid: [S] float64, the times from the first call on; known with the first call, as is `span`.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.grid: Tensor | None = None
        self.span: Span | None = None
        self.step = 0
        self.stepped = False
        self.last: float | None = None
        self._readings: list[_Reading] = []  # more than one as long as several fit

    @property
    def started(self) -> bool:
        return self.grid is not None

    def called(self, time: float | None) -> float:
        """Tell it of a call with this time. Returns the call's place in the range, in [0, 1]."""
        if self.grid is None or self.span is None:
            grid = _grid(self.scheduler)
            self.span = span_of(self.scheduler, grid)
            begin = getattr(self.scheduler, "begin_index", None) or 0
            begin = min(begin, len(grid) - 1)
            self._readings, first = ([], begin) if time is None else _readings(time, grid, self.span, begin)
            self.grid = grid[first:]
        elif self.stepped or time != self.last:
            self.step += 1
        self.stepped, self.last = False, time
        there = float(self.grid[min(self.step, len(self.grid) - 1)])
        if not self._readings or time is None:
            return float(self.span.share(there))
        if len(self._readings) > 1:
            size = self.span.high - self.span.low
            self._readings = [one for one in self._readings if one.near(time, there, size)] or self._readings[:1]
        return float(self.span.share(self._readings[0](time)))


def _grid(scheduler: Any) -> Tensor:
    """A scheduler's times, as it is about to sample them."""
    times = getattr(scheduler, "timesteps", None)
    return torch.zeros(1, dtype=torch.float64) if times is None else torch.as_tensor(times).to("cpu", torch.float64)


class _Counted:
    """A scheduler's `step` that tells a track of each call; a copy of the scheduler gets one of its own.

    Calls of other threads are not told, nor those within `unwatched`. A method of the scheduler's class is looked up
    at each call: while a pipeline samples, its schedulers are of a class that draws other noise.
    """

    def __init__(self, scheduler: Any, step: Callable, before: Callable[[], None]) -> None:
        self.scheduler, self.step, self.before = scheduler, step, of_this_thread(before)
        self.__signature__ = inspect.signature(step)  # pipelines look at it
        name, bound = getattr(step, "__name__", ""), getattr(step, "__self__", None) is scheduler
        own = bound and getattr(type(scheduler), name, None) is getattr(step, "__func__", step)
        self.method = name if own else ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.before()
        step = getattr(type(self.scheduler), self.method).__get__(self.scheduler) if self.method else self.step
        return step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.scheduler))
        if copied is None or not self.method:
            return self
        return _Counted(copied, getattr(type(copied), self.method).__get__(copied), self.before)


def tracks_of(pipe: Any) -> dict[str, Track]:
    """Scheduler's component name -> its track."""
    return {name: Track(scheduler) for name, scheduler in schedulers_of(pipe).items()}


def track_for(component: str, tracks: dict[str, Track]) -> Track:
    """The track of a network's scheduler: prior_scheduler of prior, super_res_scheduler of super_res_first, ..."""
    for name, track in tracks.items():
        owner = name.removesuffix("_scheduler")
        if owner != name and component.startswith(owner):
            return track
    return tracks.get("scheduler") or next(iter(tracks.values()))


@contextmanager
def counted(tracks: dict[str, Track], before_step: Callable[[Track], None]) -> Iterator[None]:
    """Watch the steps of all schedulers, and of their copies; before_step(track) is called before each."""

    def told(track: Track) -> Callable[[], None]:
        def tell() -> None:
            before_step(track)
            track.stepped = True

        return tell

    with ExitStack() as stack:
        for track in tracks.values():
            if hasattr(track.scheduler, "step"):
                step = track.scheduler.step
                stack.enter_context(own_step(track.scheduler, _Counted(track.scheduler, step, told(track))))
        yield
