"""Measured step times: of each format in all layers, which the table is made of, and of mixtures, which test it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import torch

from ohq_bench.subject import Subject
from ptq4dm.budgets.alone import alone
from ptq4dm.budgets.clocks import Figure, entry, kinds_of, time_in_place
from ptq4dm.budgets.costs import Costs, costs, words_of
from ptq4dm.budgets.graphs import time_steps, with_times_on
from ptq4dm.budgets.measure import timed_call_of
from ptq4dm.budgets.table import KEEP, Table
from ptq4dm.pipelines.denoiser import evaluation_mode


def measured_costs(subject: Subject, args, clock: Callable[[], float]) -> dict:
    """Times of all layers and steps, as JSON holds them."""
    call = timed_call_of(subject.model, subject.calls, args.batch)
    found = costs(subject.model, call, {KEEP: {}, **subject.formats}, args.rounds, "", clock)
    layers = {label: {name: astuple(one) for name, one in row.items()} for label, row in found.layers.items()}
    steps = {label: astuple(one) for label, one in found.steps.items()}
    return {"layers": layers, "steps": steps, "where": found.where}


def read_costs(data: dict) -> Costs:
    """What `measured_costs` wrote."""
    layers = {label: {name: Figure(*one) for name, one in row.items()} for label, row in data["layers"].items()}
    return Costs(layers, {label: Figure(*one) for label, one in data["steps"].items()}, data["where"], False)


def mixtures(table: Table, count: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Name -> picks of random mixtures, each with formats in shares that are drawn, and of uniform formats.

    One format in all layers is timed again: where it takes another share of the step than in the table, it is the
    machine that has changed.
    """
    draw, plans, layers = np.random.default_rng(seed), {}, np.arange(len(table.layers))
    for number in range(count):
        shares = draw.dirichlet(np.ones(len(table.labels)))
        picks = draw.choice(len(table.labels), size=len(layers), p=shares)
        plans[str(number)] = np.where(table.allowed[layers, picks], picks, table.stands[layers, picks])
    return plans | {label: table.uniform(label) for label in table.labels[1:]}


def step_times(subject: Subject, table: Table, plans: dict, args, clock: Callable[[], float]) -> list[dict]:
    """Predicted and measured times of plans, as shares of the step in full precision, timed in turns."""
    layers = [{}, *subject.formats.values()]

    def quantized(picks) -> dict:
        rows = zip(table.layers, map(int, picks), strict=True)
        return {name: layers[pick][name] for name, pick in rows if name in layers[pick]}

    formats = {KEEP: {}, **{name: quantized(picks) for name, picks in plans.items()}}
    call = timed_call_of(subject.model, subject.calls, args.batch)
    if next(subject.model.parameters()).is_cuda:
        steps = time_steps(subject.model, call, formats, args.rounds)
    else:
        seconds = time_in_place(subject.model, call, formats, [], args.rounds, clock).steps
        steps = {name: Figure.of(numbers) for name, numbers in seconds.items()}
    whole, rows = steps[KEEP], []
    for name, picks in plans.items():
        figure, predicted = steps[name], table.latency(np.array(picks))
        rows.append({
            "plan": name, "predicted": predicted, "measured": figure.median / whole.median,
            "ratio": predicted / (figure.median / whole.median), "quartiles": [figure.low, figure.high],
            "microseconds": figure.median,
        })  # fmt: skip
    return rows


@torch.no_grad()
def by_themselves(subject: Subject, table: Table, plans: dict, times: list[dict], args) -> dict:
    """The plans predicted from layers that were each timed by itself, on a GPU.

    "cold", "warm": plan -> predicted over measured, with operands in memory and in the cache. "added": kind -> format
    -> microseconds that a layer of it adds to full precision: "cold", "warm", and in the step, "in place".
    """
    model, formats = subject.model, {KEEP: {}, **subject.formats}
    device = next(model.parameters()).device
    call = with_times_on(device, model, timed_call_of(model, subject.calls, args.batch))
    kinds = kinds_of(model, subject.names, call)
    words = {label: {name: words_of(layers.get(name)) for name in kinds} for label, layers in formats.items()}
    numbers = {name: row for row, name in enumerate(table.layers)}
    added: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in kinds.values()}
    found: dict[str, dict] = {}
    for way, cold in (("cold", True), ("warm", False)):
        with torch.cuda.device(device), evaluation_mode(model):
            figures = alone(model, call, formats, kinds, words, args.rounds, cold)
        more = np.zeros_like(table.times)
        first = {kind: name for name, kind in reversed(list(kinds.items()))}  # it stands for all of its kind
        for name, kind in kinds.items():
            for column, label in enumerate(table.labels):
                one = figures[entry(kind, words[label][first[kind]])].median - figures[entry(kind, KEEP)].median
                more[numbers[name], column] = one
                if column and table.allowed[numbers[name], column]:
                    row = added[kind].setdefault(label, {})
                    row[way] = one
                    row["in place"] = float(table.times[numbers[name], column] - table.times[numbers[name], 0])
        rows = np.arange(len(table.layers))
        measured = {one["plan"]: one["measured"] for one in times}
        found[way] = {
            plan: float((1 + more[rows, np.array(picks)].sum() / table.step) / measured[plan])
            for plan, picks in plans.items()
        }
    return {**found, "added": added}
