"""Record what the denoisers of a pipeline are called with while the pipeline samples.

Each seed is recorded at one time: at the step whose time is nearest. Nothing is decoded: sampling stops after the
last wanted call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..pipelines.denoiser import denoiser_name
from .calls import Call, Calls, Part, parameter_place, rows_of_call, timestep_of, whole_call
from .clock import Span, Track, track_for, tracks_of
from .look import Sampling, look
from .record import named
from .request import Done, Request, never_called, request_of


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
            raise Done
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
            raise Done

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
            request.run([int(seeds[k]) for k in run], sampling.bare)
        recorder.finish()
        if lacking := [int(seeds[k]) for place, k in enumerate(run) if place not in recorder.given]:
            raise never_called(request, lacking)
    return calls


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
