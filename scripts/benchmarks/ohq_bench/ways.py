"""Ways to find what each layer's format does to the prediction, each in two halves of the tuples, and how they agree.

Two halves, with masks of their own, tell how much of a correlation the noise of tuples and masks leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
from scipy.stats import spearmanr

from ohq_bench.kept import Kept
from ohq_bench.subject import Subject
from ptq4dm.budgets.masking import Sensitivity, direct, masked
from ptq4dm.budgets.measure import noised
from ptq4dm.calibration.calls import Calls
from ptq4dm.calibration.evidence import chosen_calls, squared_error

WAYS = ["masked, weights", "masked, outputs", "direct", "masked, weights, noise", "masked, outputs, noise"]
Errors = dict[str, dict[str, float]]  # layer -> label -> error


def parts_of(calls: Calls, args) -> list[list[Calls]]:
    """The tuples dealt out to the draws, in batches of one run each."""
    chosen = chosen_calls(calls, args.tuples)
    return [list(chosen[first :: args.draws].batches(args.error_batch)) for first in range(args.draws)]


def found_by(way: str, subject: Subject, args, kept: Kept) -> tuple[Sensitivity, dict]:
    """(the mean of both halves, {"forwards", "seconds", "halves"}) of a way; halves: how they agree."""
    calls = noised(subject.calls, args.seed) if way.endswith("noise") else subject.calls
    parts = parts_of(calls, args)
    halves = [kept.once(f"{way}, half {half}", _run(way, subject, parts[half::2], args, half)) for half in (0, 1)]
    first, second = (half["errors"] for half in halves)
    mean = {
        name: {label: (value + second[name][label]) / 2 for label, value in row.items()}
        for name, row in first.items()
    }
    forwards = sum(half["forwards"] for half in halves)
    facts = {
        "forwards": forwards,
        "seconds": round(sum(half["seconds"] for half in halves), 1),
        "halves": correlations(first, second, list(subject.formats)),
    }
    return Sensitivity(mean, forwards), facts


def _run(way: str, subject: Subject, parts: list, args, half: int) -> Callable[[], dict]:
    """What makes one half's sensitivities, as JSON holds them, and the seconds that it takes."""

    def make() -> dict:
        start, seed = time.perf_counter(), 2 * args.seed + half
        what = subject.model, subject.formats, subject.names, parts
        scale = way.removeprefix("masked, ").removesuffix(", noise")
        found = direct(*what) if way == "direct" else masked(*what, args.share, scale, seed)
        return asdict(found) | {"seconds": time.perf_counter() - start}

    return make


def correlations(found: Errors, exact: Errors, labels: list[str]) -> dict[str, float]:
    """Label -> Spearman's correlation over layers; "mean" of them."""
    names = [name for name in exact if any(exact[name].values())]
    values = {
        label: float(spearmanr([found[n][label] for n in names], [exact[n][label] for n in names]).statistic)
        for label in labels
    }
    return {**values, "mean": float(np.mean(list(values.values())))}


def weight_errors(subject: Subject) -> Errors:
    """Layer -> label -> |W - Q|^2: what weights alone tell."""
    found: Errors = {}
    for name in subject.names:
        weight = subject.model.get_submodule(name).weight.detach()
        found[name] = {
            one.label: squared_error(weight, one.layers[name].dequantized_weight()) for one in subject.candidates
        }
    return found
