"""The table that a choice looks at, measured: times in place, bytes of packed layers, errors by masks or directly."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..calibration.calls import Call, Calls, Group, Part
from ..calibration.evidence import chosen_calls
from ..calibration.record import ready
from ..calibration.trace import trace
from ..layers.sizes import bytes_in_16_bits
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode
from ..progress import note
from .candidates import Candidate, activation_of, width_of
from .clocks import WARM_UP, Clock
from .costs import Costs, costs
from .masking import Sensitivity, direct, masked, parts_of
from .options import BudgetOptions
from .table import KEEP, Table

LONG = 10.0
"""Seconds of work that are told beforehand."""


def measured(
    model: nn.Module,
    views: list[LayerView],
    candidates: Sequence[Candidate],
    calls: Calls,
    options: BudgetOptions,
    clock: Clock = time.perf_counter,
) -> Table:
    """The table of a model's layers and candidates, on recorded calls. The model stays as it is."""
    names = [view.name for view in views]
    formats = {candidate.label: candidate.layers for candidate in candidates}
    call = timed_call_of(model, calls, options.timed_batch)
    seconds = forecast(model, call, len(views), len(formats), options)
    if sum(seconds) > LONG:
        timing, errors = (f"about {one:.0f} s" for one in seconds)
        known = "unless they are known already"
        note(f"timing {len(formats)} formats takes {timing}, {known}; errors of {len(views)} layers take {errors}")
    found = costs(model, call, {KEEP: {}, **formats}, options.rounds, options.costs, clock)
    return table_of(model, views, candidates, calls, found, sensitivities(model, formats, names, calls, options))


def forecast(model: nn.Module, call: Call, layers: int, formats: int, options: BudgetOptions) -> tuple[float, float]:
    """Seconds that timing and sensitivities will take, about, by one call of the model; on a GPU 0."""
    if next(model.parameters()).device.type != "cpu":
        return 0.0, 0.0
    seconds = []
    with torch.no_grad(), evaluation_mode(model):
        for _ in range(2):
            start = time.perf_counter()
            model(*call.args, **call.kwargs)
            seconds.append(time.perf_counter() - start)
    runs = layers * (formats if options.sensitivity == "direct" else 1) + 1
    timing = 2 * (formats + 1) * (WARM_UP + options.rounds)  # every format in a model by itself, and in a mixture
    return min(seconds) * timing, min(seconds) * runs * options.num_tuples / options.timed_batch


def timed_call_of(model: nn.Module, calls: Calls, rows: int) -> Call:
    """One call of the model with so many rows, on its device; of whole calls the first."""
    first = next(calls.batches(1))
    joined = calls.groups[int(first.places[0, 0])].joined
    same = (calls.places[:, 0] == first.places[0, 0]).nonzero().flatten()
    units = same[torch.arange(rows) % len(same)] if joined else same[:1]
    return ready(calls[units], model)


def sensitivities(
    model: nn.Module, formats: dict[str, dict[str, nn.Module]], names: list[str], calls: Calls, options: BudgetOptions
) -> Sensitivity:
    """Of each layer and format, what it adds to the prediction's error, as the options say."""
    chosen = chosen_calls(calls, options.num_tuples)
    if options.inputs == "noise":
        chosen = noised(chosen, options.seed)
    parts = parts_of(chosen, options.num_tuples, options.draws)
    if options.sensitivity == "direct":
        return direct(model, formats, names, parts)
    return masked(model, formats, names, parts, options.share, options.scale, options.seed)


def noised(calls: Calls, seed: int) -> Calls:
    """The same calls with standard normal noise in place of the first tensor of each that has a channel axis."""
    draw, found = torch.Generator("cpu").manual_seed(seed), Calls(calls.dtype, calls.source)
    for number, group in enumerate(calls.groups):
        mine = calls.places[:, 0] == number
        if not mine.any():
            continue
        own = group.read(calls.places[mine, 1].tolist())
        least = 3 if group.joined else 2
        samples = next((i for i, t in sorted(own.items()) if t.is_floating_point() and t.ndim >= least), None)
        if samples is not None:
            own[samples] = torch.randn(own[samples].shape, generator=draw).to(own[samples])
        part = Part.of(own, int(mine.sum()))
        new = Group(group.structure, group.leaves, group.own, group.joined, [part])
        found.add(new, calls.timestep[mine], calls.time[mine])
    return found


def table_of(
    model: nn.Module,
    views: list[LayerView],
    candidates: Sequence[Candidate],
    calls: Calls,
    found: Costs,
    sensitivity: Sensitivity,
) -> Table:
    """The table of measured times and sensitivities."""
    names, labels = [view.name for view in views], [KEEP, *(candidate.label for candidate in candidates)]
    shape = len(names), len(labels)
    times, spreads, sizes, errors = (np.zeros(shape) for _ in range(4))
    allowed: np.ndarray = np.zeros(shape, bool)
    stands: np.ndarray = np.zeros(shape, int)
    widths, words = np.full(shape, 32), [["float"] * len(labels) for _ in names]
    for row, view in enumerate(views):
        plans: list = [None]
        for column, label in enumerate(labels):
            plan = None if column == 0 else candidates[column - 1].plans.get(view.name)
            plans.append(plan)
            same = plans[1:].index(plan)  # that of an earlier label, or its own
            allowed[row, column], stands[row, column] = same == column, same
            if same != column:
                continue
            layer = view.module if column == 0 else candidates[column - 1].layers[view.name]
            sizes[row, column], widths[row, column] = bytes_in_16_bits(layer), width_of(plan)
            words[row][column] = activation_of(label, plan)
            if view.name in found.layers[label]:  # one that the call does not reach takes no time
                figure = found.layers[label][view.name]
                times[row, column], spreads[row, column] = figure.median, figure.spread
            errors[row, column] = sensitivity.errors[view.name].get(label, 0.0) if column else 0.0
    total, step = bytes_in_16_bits(model), found.steps[KEEP]
    return Table(
        names, labels, times, spreads, sizes, errors, allowed, widths, words, _ties(model, views, calls),
        step.median, found.outside, total, total - float(sizes[:, 0].sum()), found.where,
        sensitivity.forwards, {label: figure.median for label, figure in found.steps.items()},
        step.spread / step.median, step.count, stands,
    )  # fmt: skip


def _ties(model: nn.Module, views: list[LayerView], calls: Calls) -> list[list[int]]:
    """Groups of layers, by number, that share an input."""
    traced, numbers = trace(model, views, calls), {view.name: row for row, view in enumerate(views)}
    groups = {tuple(sorted(numbers[name] for name in seen.shares if name in numbers)) for seen in traced.values()}
    return [list(group) for group in sorted(groups) if len(group) > 1]
