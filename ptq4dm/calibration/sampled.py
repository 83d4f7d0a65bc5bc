"""Record what the denoisers of a pipeline are called with while the pipeline samples.

Each seed is recorded at one time: at the step whose time is nearest. Nothing is decoded: sampling stops after the
last wanted call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hooks import hooked
from ..pipelines.denoiser import denoiser_name, denoiser_names, evaluation_mode, networks_of, schedulers_of
from ..pipelines.sampling import call_pipeline
from .calls import Call, Calls, Part, parameter_place, rows_of_call, timestep_of, whole_call
from .clock import Span, Track, counted, track_for, tracks_of
from .record import kept, named
from .rows import RowRule, row_rule


class _Done(Exception):
    """Raised inside the sampling loop once every call is on record: the remaining steps need not run."""


@dataclass(frozen=True)
class Sampling:
    """How a pipeline samples, as its first call shows.

    span: the range of its scheduler's times; grid: [S] float64, the times that it samples at.
    rule: how the rows of its calls belong to its seeds; None where they do not: then each seed is sampled by itself.
    """

    span: Span
    grid: Tensor
    rule: RowRule | None


@dataclass
class Request:
    """What to record of a pipeline, and how to run it."""

    pipe: Any
    components: list[str]
    options: dict[str, Any]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: getattr(self.pipe, name) for name in self.components}

    def run(self, seeds: Sequence[int]) -> None:
        call_pipeline(self.pipe, seeds, **self.options)

    @contextmanager
    def watched(self, tracks: dict[str, Track], watcher: Any) -> Iterator[None]:
        """watcher.called(component, module, call) before each call, watcher.stepping(track) before each step."""

        def hook(component: str) -> Any:
            return lambda module, args, kwargs: watcher.called(component, module, Call(args, kwargs))

        with ExitStack() as stack:
            for network in self.networks.values():  # first: no other thread's calls reach the hooks
                stack.enter_context(evaluation_mode(network))
            for name, network in self.networks.items():
                stack.enter_context(hooked(network, {"": hook(name)}))
            stack.enter_context(counted(tracks, watcher.stepping))
            stack.enter_context(suppress(_Done))
            yield


def request_of(
    pipe: Any,
    components: Sequence[str] | None = None,
    *,
    num_inference_steps: int,
    conditioning: dict | None = None,
    pipeline_kwargs: dict | None = None,
) -> Request:
    """A request for the calls of some networks of a pipeline, of all its denoisers by default.

    Raises UserError where the pipeline has no such network, or no scheduler.
    """
    networks = networks_of(pipe)
    for name in components or ():
        if name not in networks:
            raise UserError(f"{type(pipe).__name__} has no network '{name}'; it has {', '.join(networks)}.")
    if not schedulers_of(pipe):
        raise UserError(f"{type(pipe).__name__} has no scheduler; record its calls with ptq4dm.record(model).")
    options = {
        "num_inference_steps": num_inference_steps,
        "conditioning": conditioning,
        "pipeline_kwargs": pipeline_kwargs,
    }
    return Request(pipe, list(components or denoiser_names(pipe)), options)


# --- how it samples -------------------------------------------------------------------------------------------


@dataclass
class _First:
    """The first call of a run, and the time it was made at."""

    tracks: dict[str, Track]
    component: str = ""
    call: Call | None = None
    track: Track | None = None

    def called(self, component: str, module: nn.Module, call: Call) -> None:
        self.component, self.call = component, kept(call)
        self.track = track_for(component, self.tracks)
        self.track.called(timestep_of(named(module, call)))
        raise _Done

    def stepping(self, track: Track) -> None: ...


def look(request: Request, seed: int) -> Sampling:
    """How a pipeline samples: its first call with one seed beside its first call with two.

    Raises UserError where no network of the request is called.
    """
    one = _first(request, [seed])
    if one.call is None or one.track is None or one.track.grid is None or one.track.span is None:
        raise _never_called(request, [seed])
    try:
        two = _first(request, [seed, seed + 1])
    except Exception:  # of whatever the pipeline cannot do with two seeds: it is sampled one by one
        return Sampling(one.track.span, one.track.grid, None)
    rule = None
    if two.call is not None and two.component == one.component:
        network = request.networks[one.component]
        with evaluation_mode(network):
            rule = row_rule(network, one.call, two.call)
    return Sampling(one.track.span, one.track.grid, rule)


def _first(request: Request, seeds: list[int]) -> _First:
    first = _First(tracks_of(request.pipe))
    with request.watched(first.tracks, first):
        request.run(seeds)
    return first


# --- recording ------------------------------------------------------------------------------------------------


@dataclass
class _Wanted:
    """The steps of one scheduler at which seeds are recorded: index [B], known with the first call."""

    track: Track
    index: Tensor | None = None

    def choose(self, times: Tensor, span: Span) -> None:
        """times: [B] in `span`."""
        grid, own = self.track.grid, self.track.span
        assert grid is not None and own is not None
        times = times if own == span else own.time(span.share(times))
        self.index = (times[:, None] - grid[None, :]).abs().argmin(dim=1)

    @property
    def last(self) -> int:
        return -1 if self.index is None else int(self.index.max())


@dataclass
class _Recorder:
    """The calls of one run: of seed k those at the step whose time is nearest times[k].

    latest: what was called at the latest step, for seeds that want a later one: sampling may end before it.
    """

    tracks: dict[str, Track]
    times: Tensor
    sampling: Sampling
    calls: dict[str, Calls]
    wanted: dict[int, _Wanted] = field(default_factory=dict)
    latest: list[tuple[str, Call, int, float, float]] = field(default_factory=list)
    given: set[int] = field(default_factory=set)  # places of the seeds that gave calls

    def __post_init__(self) -> None:
        for name in self.calls:
            track = track_for(name, self.tracks)
            self.wanted.setdefault(id(track), _Wanted(track))

    def called(self, component: str, module: nn.Module, call: Call) -> None:
        track = track_for(component, self.tracks)
        wanted = self.wanted[id(track)]
        timestep, before = timestep_of(named(module, call)), (track.started, track.step)
        time = track.called(timestep)
        if wanted.index is None:
            wanted.choose(self.times, self.sampling.span)
        if self._complete():
            raise _Done
        assert wanted.index is not None
        rows = (wanted.index == track.step).nonzero().flatten()
        number = time if timestep is None else timestep
        if len(rows):
            self._keep(component, call, rows, number, time)
        if before != (track.started, track.step):
            self.latest = [one for one in self.latest if one[2] != id(track)]
        if track.step < wanted.last:
            copied = call.map(lambda tensor: tensor.detach().clone())
            self.latest.append((component, copied, id(track), number, time))

    def stepping(self, track: Track) -> None:
        """A step ends here, and with the last wanted one the recording."""
        if self._complete(after=track):
            raise _Done

    def _complete(self, after: Track | None = None) -> bool:
        """Whether all wanted steps are over; the step that `after` is in counts as over."""
        return all(
            one.index is not None and one.track.step + (one.track is after and not one.track.stepped) > one.last
            for one in self.wanted.values()
        )

    def finish(self) -> None:
        """Record the latest calls for the seeds whose times were not reached."""
        for component, call, track, number, time in self.latest:
            one = self.wanted[track]
            assert one.index is not None
            rows = (one.index > one.track.step).nonzero().flatten()
            if len(rows):
                self._keep(component, call, rows, number, time)

    def _keep(self, component: str, call: Call, rows: Tensor, number: float, time: float) -> None:
        rule, batch = self.sampling.rule, len(self.times)
        self.given.update(rows.tolist())
        if rule is not None and rule.fits(call, batch):
            every = rule.rows(rows, batch)
            group, numbers, times = rows_of_call(rule.with_times(call, batch), rule.own, every, number, time)
        else:
            group, numbers, times = whole_call(call, number, time)
        own = group.parts[0].load(torch.arange(len(numbers)))
        group.parts = [Part.of({i: _copied(tensor) for i, tensor in own.items()}, len(numbers))]
        group.leaves = [_copied(leaf) if isinstance(leaf, Tensor) else leaf for leaf in group.leaves]
        self.calls[component].add(group, numbers, times)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def record_components(
    request: Request, seeds: Sequence[int], timesteps: Sequence[float], sampling: Sampling | None = None
) -> dict[str, Calls]:
    """Sample once, and record of seeds[k] the calls at the time nearest timesteps[k]: component -> calls, on the CPU.

    timesteps are in the range of the pipeline's scheduler (0 .. num_train_timesteps - 1, say).
    sampling: as `look` says.

    Raises UserError where a seed gave no call.
    """
    if len(timesteps) != len(seeds):
        raise UserError(f"one timestep for each seed is needed; got {len(timesteps)} for {len(seeds)} seeds.")
    sampling = sampling or look(request, int(seeds[0]))
    times = torch.as_tensor(list(timesteps), dtype=torch.float64)
    calls = {name: Calls(parameter_place(network)[1]) for name, network in request.networks.items()}
    runs = [range(len(seeds))] if sampling.rule is not None else [[k] for k in range(len(seeds))]
    for run in runs:
        recorder = _Recorder(tracks_of(request.pipe), times[list(run)], sampling, calls)
        with request.watched(recorder.tracks, recorder):
            request.run([int(seeds[k]) for k in run])
        recorder.finish()
        if lacking := [int(seeds[k]) for place, k in enumerate(run) if place not in recorder.given]:
            raise _never_called(request, lacking)
    return calls


def _never_called(request: Request, seeds: list[int]) -> UserError:
    return UserError(
        f"{type(request.pipe).__name__} never calls {', '.join(request.components)} so (seed {seeds[0]}); name the "
        "networks that it does call with component=."
    )


def record_calls(
    pipe: Any,
    seeds: Sequence[int],
    timesteps: Sequence[float],
    *,
    component: str | None = None,
    sampling: Sampling | None = None,
    **options: Any,
) -> Calls:
    """Sample once and record one network's calls: of seeds[k] those at the time nearest timesteps[k].

    component: the network, the main denoiser by default. options: num_inference_steps, conditioning, pipeline_kwargs
    as in `sampling.sample`. A pipeline that guides by one call of two rows a seed, or by two calls, gives two units.
    """
    name = component or denoiser_name(pipe)
    return record_components(request_of(pipe, [name], **options), seeds, timesteps, sampling)[name]
