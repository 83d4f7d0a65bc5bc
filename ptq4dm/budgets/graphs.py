"""Times of a model's layers on a GPU, in place: CUDA graphs of the whole step, with layers of one kind in a format.

What a format adds to a step is measured twice for each kind of layer; the mean of both is dealt out to its layers:

    first   step(the kind in the format, all else in full precision) - step(full precision)
    last    step(all in the format) - step(all but the kind in the format)

A layer by itself tells something else: in a step its operands may lie in a cache, what it gives may lie in another
order in memory, and the layers beside it then take more or less time. Of what two layers do to each other each has
its half in this mean: one format in all layers comes out as it was measured, a mixture nearly. The graphs of a
difference take turns, so that a GPU that changes its clock changes all of them. Our own way: the paper measures an
FPGA's operators.

In full precision a kind has the time that one of its layers takes by itself: that alone says how much of a step is
outside of the layers, and no choice depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..calibration.calls import Call
from ..calibration.evidence import substituted
from ..calibration.record import times_of
from ..kernels.tuning import stopwatch
from ..pipelines.denoiser import evaluation_mode
from ..progress import progress_bar
from .alone import alone, in_turns
from .clocks import Figure, entry
from .table import KEEP

ENOUGH = 0.2  # seconds of one difference; of long steps fewer are needed, for they are steadier
LEAST = 3  # turns

Formats = Mapping[str, Mapping[str, nn.Module]]


def time_in_graphs(
    model: nn.Module,
    call: Call,
    formats: Formats,
    kinds: Mapping[str, str],
    words: Mapping[str, Mapping[str, str]],
    rounds: int,
) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """("kind | format" -> figure of one layer, label -> figure of the step); arguments as in `costs`.

    formats: KEEP is one of them.
    """
    device = next(model.parameters()).device
    call = with_times_on(device, model, call)
    with torch.no_grad(), torch.cuda.device(device), evaluation_mode(model):
        bench = _Steps(model, call)
        whole = {label: bench.graph({**layers}) for label, layers in formats.items()}
        steps = _figures(in_turns(whole, rounds))
        turns = _turns_of(rounds, steps[KEEP].median * 1e-6)
        added: dict[tuple[str, str], Figure] = {}
        places = [
            (label, kind, said, names)
            for label, layers in formats.items()
            for (kind, said), names in _grouped(kinds, words[label]).items()
            if said != KEEP
        ]
        for label, kind, said, names in progress_bar(places, desc="timing", unit="kind"):
            if (kind, said) not in added:
                added[kind, said] = bench.difference(whole, formats[label], label, names, turns)
        by_themselves = alone(model, call, {KEEP: {}}, kinds, {KEEP: dict.fromkeys(kinds, KEEP)}, rounds)
    return _together({kind: by_themselves[entry(kind, KEEP)] for kind in kinds.values()}, added), steps


def time_steps(model: nn.Module, call: Call, formats: Formats, rounds: int) -> dict[str, Figure]:
    """Label -> figure of the whole step with that format's layers in place; graphs that take turns."""
    device = next(model.parameters()).device
    call = with_times_on(device, model, call)
    with torch.no_grad(), torch.cuda.device(device), evaluation_mode(model):
        bench = _Steps(model, call)
        return _figures(in_turns({label: bench.graph({**layers}) for label, layers in formats.items()}, rounds))


@dataclass
class _Steps:
    """Graphs of steps of one model, on one call, in one pool of memory: they never run at the same time."""

    model: nn.Module
    call: Call
    pool: Any = None

    def graph(self, layers: dict[str, nn.Module]) -> Any:
        """The graph of a step with some layers in place."""
        with substituted(self.model, layers):
            graph, _ = stopwatch.graph_of([lambda: self.model(*self.call.args, **self.call.kwargs)], self.pool)
        self.pool = self.pool or graph.pool()
        return graph

    def difference(
        self, whole: dict[str, Any], layers: Mapping[str, nn.Module], label: str, names: list[str], turns: int
    ) -> Figure:
        """What one of the named layers adds to a step, in microseconds, below 0 where it saves."""
        only = {name: layers[name] for name in names}
        rest = {name: layer for name, layer in layers.items() if name not in only}
        four = {
            "none": whole[KEEP],
            "first": self.graph(only) if rest else whole[label],
            "all": whole[label],
            "last": self.graph(rest) if rest else whole[KEEP],
        }
        seconds = {name: np.array(numbers) for name, numbers in in_turns(four, turns).items()}
        added = (seconds["first"] - seconds["none"] + seconds["all"] - seconds["last"]) / 2
        return Figure.of((added / len(names)).tolist())


def _turns_of(rounds: int, step: float) -> int:
    """How many turns a difference of four graphs has, of steps of so many seconds."""
    return max(min(rounds, math.floor(ENOUGH / (4 * step))), LEAST)


def _figures(seconds: Mapping[str, list[float]]) -> dict[str, Figure]:
    return {name: Figure.of(numbers) for name, numbers in seconds.items()}


def _grouped(kinds: Mapping[str, str], words: Mapping[str, str]) -> dict[tuple[str, str], list[str]]:
    """(kind, format in words) -> the layers of it."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, kind in kinds.items():
        found.setdefault((kind, words[name]), []).append(name)
    return found


def _together(whole: Mapping[str, Figure], added: Mapping[tuple[str, str], Figure]) -> dict[str, Figure]:
    """ "kind | format" -> figure, of full precision by itself and of what formats add to it.

    Where a format saves more than that in a step, full precision takes as much there: no time is below 0.
    """
    found = {}
    for kind, one in whole.items():
        saved = max((-figure.median for (of, _), figure in added.items() if of == kind), default=0.0)
        more = max(saved - one.median, 0.0)
        found[entry(kind, KEEP)] = Figure(one.median + more, one.low + more, one.high + more, one.count)
    for (kind, said), one in added.items():
        base = found[entry(kind, KEEP)].median
        low, high = (max(base + value, 0.0) for value in (one.low, one.high))
        found[entry(kind, said)] = Figure(base + one.median, low, high, one.count)
    return found


def with_times_on(device: torch.device, model: nn.Module, call: Call) -> Call:
    """A call whose times are tensors of a device, as a scheduler's are: a graph copies no number there."""
    leaves, structure = call.flat()
    for i in times_of(model, call):
        leaves[i] = torch.as_tensor(leaves[i], device=device)
    return Call.nested(leaves, structure)
