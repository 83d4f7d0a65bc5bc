"""Choices of formats under budgets, what they are held against, and the errors of all, measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ohq_bench.held_out import HeldOut
from ptq4dm.budgets.exact import allocate, least
from ptq4dm.budgets.references import dealt_out, greedy, random_choices
from ptq4dm.budgets.table import KEEP, Table


def at_a_budget(truth: HeldOut, table: Table, wide: str, narrow: str, args) -> dict:
    """The choices at the bytes midway between two uniform formats, and the errors of all, measured."""
    ends = [table.uniform(label) for label in (wide, narrow)]
    sizes = [table.size(picks) for picks in ends]
    budget = sum(sizes) / 2
    chosen = allocate(table, None, budget).picks
    quick = greedy(table, None, budget)
    drawn = random_choices(table, args.random, args.seed, None, budget)
    shuffled = [allocate(dealt_out(table, seed), None, budget).picks for seed in range(args.permuted)]
    by_error = sorted(drawn, key=truth.error)
    measured = [truth.error(picks) for picks in by_error]
    wrong = [truth.error(picks) for picks in ends]
    kept, low = (with_kept(table, picks, chosen) for picks in ends)
    no_keep = allocate(without_kept(table), None, budget).picks
    facts = {
        "layers kept": int((chosen == 0).sum()),
        "kept": {
            "between": between(truth, table, kept, low, budget), "bytes": [table.size(kept), table.size(low)],
            "error": [truth.error(kept), truth.error(low)],
        },
        "none kept": {
            "error": truth.error(no_keep), "bytes": table.size(no_keep),
            "chosen_over_it": truth.interval(chosen, no_keep),
        },
        "bytes": {"budget": budget, wide: sizes[0], narrow: sizes[1], "chosen": table.size(chosen)},
        "error": {wide: wrong[0], narrow: wrong[1], "interpolated": sum(wrong) / 2, "chosen": truth.error(chosen)},
        "predicted": {"chosen": table.error(chosen), wide: table.error(ends[0]), narrow: table.error(ends[1])},
        "predicted_latency": table.latency(chosen),
        "interval": truth.interval(chosen),
        "random": {
            "count": len(drawn), "least": measured[0], "median": measured[len(measured) // 2],
            "chosen_over_least": truth.interval(chosen, by_error[0]),
        },
        "permuted": sorted(truth.error(picks) for picks in shuffled),
        "formats": {label: int((chosen == number).sum()) for number, label in enumerate(table.labels)},
        "picks": {"chosen": chosen.tolist()},
    }  # fmt: skip
    if quick is not None:
        facts["greedy"] = {
            "error": truth.error(quick), "predicted": table.error(quick),
            "chosen_over_greedy": truth.interval(chosen, quick),
        }  # fmt: skip
        facts["picks"]["greedy"] = quick.tolist()
    return facts


def with_kept(table: Table, picks, chosen) -> np.ndarray:
    """Uniform picks, but full precision where a choice keeps it: what keeping these layers is worth by itself."""
    return np.where(chosen == 0, 0, picks)


def without_kept(table: Table) -> Table:
    """The table without full precision for layers that can have a format."""
    allowed = table.allowed.copy()
    allowed[:, 0] = ~allowed[:, 1:].any(1)
    return replace(table, allowed=allowed)


def between(truth: HeldOut, table: Table, wide, narrow, budget: float) -> float:
    """The error on the line between two picks at the bytes of a budget; beyond them on the same line, not below 0."""
    share = (budget - table.size(narrow)) / (table.size(wide) - table.size(narrow))
    return max(truth.error(narrow) + share * (truth.error(wide) - truth.error(narrow)), 0.0)


def uniform(truth: HeldOut, table: Table) -> dict[str, dict]:
    """Label -> what one format in all layers costs: predicted, and measured."""
    return {
        label: {
            "latency": table.latency(picks), "bytes": table.size(picks), "predicted": table.error(picks),
            "error": truth.error(picks), "measured_latency": table.measured[label] / table.step,
        }
        for label, picks in ((label, table.uniform(label)) for label in table.labels)
    }  # fmt: skip


def fronts(truth: HeldOut, table: Table, points: int) -> list[dict]:
    """Choices under evenly spaced budgets of bytes alone and of time alone, and their errors, measured."""
    found = []
    for kind, costs, share in (("bytes", table.bytes, table.size), ("latency", table.times, table.latency)):
        ends = share(least(table, costs)), share(table.uniform(KEEP))
        for number in range(points if ends[0] < ends[1] else 1):
            budget = ends[0] * (1 + 1e-6) + (ends[1] - ends[0]) * number / points
            one = allocate(table, **{"size" if kind == "bytes" else kind: budget})
            found.append({
                "budget": kind, "of": budget, "bytes": one.bytes, "predicted_latency": one.latency,
                "predicted": one.error, "error": truth.error(one.picks), "picks": one.picks.tolist(),
            })  # fmt: skip
    return found
