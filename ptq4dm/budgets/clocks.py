"""Times of a model's layers in place: while the whole model runs on a call as a sampler makes it.

On a CPU a clock is read around every call of a layer, so caches and memory are as they are in the model, and formats
take turns, round by round, so that whatever else the machine does meets all of them. Layers of one kind and shape
share one measurement: the mean over all of them of the median over all rounds, which sums of layers go by.

A layer takes longer where others beside it run other kernels: with int8 layers among 4-bit ones each took 0.1 ms more
on the embedded UNet, and sums of what layers take in uniform models were 3 to 10 % below measured mixtures. So each
format is timed in two surroundings, in all layers, and in mixtures in which formats are dealt out, and has the mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibration.calls import Call
from ..calibration.evidence import substituted
from ..hooks import computing, hooked, input_of
from ..pipelines.denoiser import evaluation_mode
from ..pipelines.loading import not_while_loading
from ..progress import progress_bar

WARM_UP = 2
MIXED = "mixed"

Clock = Callable[[], float]
"""Seconds, as time.perf_counter tells them."""


@dataclass
class Times:
    """Seconds that were read, by label of a format.

    layers: label -> layer -> its share of the step, one number a round. steps: label -> the whole step.
    """

    layers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)


def kinds_of(model: nn.Module, names: list[str], call: Call) -> dict[str, str]:
    """Layer -> what decides about its time: class, shapes of weight and inputs, dtype, geometry. Layers that the call
    does not reach are left out."""
    seen: dict[str, list[Tensor]] = {}

    def look(name: str) -> Callable:
        return lambda module, args, kwargs: seen.setdefault(name, []).append(input_of(args, kwargs))

    with torch.no_grad(), evaluation_mode(model), hooked(model, {name: look(name) for name in names}):
        model(*call.args, **call.kwargs)
    return {name: _kind(model.get_submodule(name), inputs) for name, inputs in seen.items()}


def _kind(layer: nn.Module, inputs: list[Tensor]) -> str:
    shapes = ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
    words = [type(layer).__name__, str(list(layer.weight.shape))]
    if isinstance(layer, nn.Conv2d):
        words += [f"stride {layer.stride}, padding {layer.padding}, dilation {layer.dilation}, groups {layer.groups}"]
    words += ["with bias" if layer.bias is not None else "without bias", f"on {shapes}"]
    return " ".join(words)


def time_in_place(
    model: nn.Module,
    call: Call,
    formats: Mapping[str, Mapping[str, nn.Module]],
    names: list[str],
    rounds: int,
    clock: Clock = time.perf_counter,
) -> Times:
    """Run the model `rounds` times with the layers of each format in place, in turns, and read the clock around them.

    call: arguments on the model's device. formats: label -> layers that take the place of the model's own.
    names: of the layers whose times are wanted.
    """
    times = Times({label: {name: [] for name in names} for label in formats}, {label: [] for label in formats})
    with torch.no_grad(), evaluation_mode(model), not_while_loading():
        for turn in progress_bar(range(WARM_UP + rounds), desc="timing", unit="round"):
            for label, layers in formats.items():
                with substituted(model, dict(layers)), _clocked(model, names, clock) as spent:
                    start = clock()
                    model(*call.args, **call.kwargs)
                    step = clock() - start
                if turn >= WARM_UP:
                    times.steps[label].append(step)
                    for name in names:
                        times.layers[label][name].append(spent[name])
    return times


@contextmanager
def _clocked(model: nn.Module, names: list[str], clock: Clock) -> Iterator[dict[str, float]]:
    """Seconds of each layer, summed over its calls in the block."""
    spent = dict.fromkeys(names, 0.0)

    def around(name: str, forward: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            output = forward(*args, **kwargs)
            spent[name] += clock() - start
            return output

        return timed

    with computing(model, {name: around(name, model.get_submodule(name).forward) for name in names}):
        yield spent


@dataclass(frozen=True)
class Figure:
    """A time in microseconds: the median of `count` numbers, and the quartiles beside it."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(seconds: list[float]) -> Figure:
        low, median, high = (float(v) for v in np.quantile(np.array(seconds) * 1e6, (0.25, 0.5, 0.75)))
        return Figure(median, low, high, len(seconds))

    @property
    def spread(self) -> float:
        return self.high - self.low


def pooled(times: Times, kinds: Mapping[str, str], chosen: Mapping[str, Mapping[str, str]]) -> dict[str, Figure]:
    """ "kind | format" -> the figure of all layers of that kind and format.

    kinds: layer -> kind. chosen: label -> layer -> its format in words.
    """
    together: dict[str, list[Figure]] = {}
    for label, layers in times.layers.items():
        for name, seconds in layers.items():
            if name in kinds and name in chosen.get(label, {}):
                together.setdefault(entry(kinds[name], chosen[label][name]), []).append(Figure.of(seconds))
    return {name: mean(figures) for name, figures in together.items()}


def mean(figures: Sequence[Figure]) -> Figure:
    """The means of several figures, for it is sums that are asked for."""
    median, low, high = (
        sum(values) / len(figures) for values in zip(*((f.median, f.low, f.high) for f in figures), strict=True)
    )
    return Figure(median, low, high, sum(figure.count for figure in figures))


def dealt(labels: list[str], names: list[str], seed: int = 0) -> dict[str, dict[str, str]]:
    """Name of a mixture -> layer -> label: as many mixtures as labels, in which each layer has each label once."""
    first = np.random.default_rng(seed).integers(len(labels), size=len(names))
    return {
        f"{MIXED} {turn}": {n: labels[(start + turn) % len(labels)] for n, start in zip(names, first, strict=True)}
        for turn in range(len(labels))
    }


def between(one: Mapping[str, Figure], other: Mapping[str, Figure]) -> dict[str, Figure]:
    """The means of two figures of each measurement; of one that has a single figure, that."""
    return {name: mean([figures[name] for figures in (one, other) if name in figures]) for name in {**one, **other}}


def entry(kind: str, words: str) -> str:
    """The name of a measurement."""
    return f"{kind} | {words}"
