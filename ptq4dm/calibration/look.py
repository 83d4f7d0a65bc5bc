"""How a pipeline samples, as its first calls show: the range of its times, its grid, whose rows its calls hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..pipelines.denoiser import evaluation_mode
from .calls import Call, timestep_of
from .clock import Span, Track, track_for, tracks_of
from .record import kept, named
from .request import Done, Request, never_called
from .rows import RowRule, row_rule


@dataclass(frozen=True)
class Sampling:
    """How a pipeline samples, as its first call shows.

    span: the range of its scheduler's times; grid: [S] float64, the times that it samples at.
    rule: how the rows of its calls belong to its seeds; None where they do not: then each seed is sampled by itself.
    bare: it takes one seed and no lists.
    """

    span: Span
    grid: Tensor
    rule: RowRule | None
    bare: bool = False


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
        raise Done

    def stepping(self, track: Track) -> None: ...


def look(request: Request, seed: int) -> Sampling:
    """How a pipeline samples: its first call with one seed beside its first call with two.

    Raises UserError where no network of the request is called.
    """
    bare = False
    try:
        one = _first(request, [seed])
    except UserError:
        raise
    except Exception as error:  # of whatever it cannot do with a list of one
        bare = True
        try:
            one = _first(request, [seed], bare)
        except Exception:
            raise error from None
    if one.call is None or one.track is None or one.track.grid is None or one.track.span is None:
        raise never_called(request, [seed])
    try:
        two = _first(request, [seed, seed + 1])
    except Exception:  # of whatever the pipeline cannot do with two seeds: it is sampled one by one
        return Sampling(one.track.span, one.track.grid, None, bare)
    rule = None
    if two.call is not None and two.component == one.component:
        network = request.networks[one.component]
        with evaluation_mode(network):
            rule = row_rule(network, one.call, two.call)
    return Sampling(one.track.span, one.track.grid, rule, bare)


def _first(request: Request, seeds: list[int], bare: bool = False) -> _First:
    first = _First(tracks_of(request.pipe))
    with request.watched(first.tracks, first):
        request.run(seeds, bare)
    return first
