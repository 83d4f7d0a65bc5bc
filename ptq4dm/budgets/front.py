"""The Pareto front: the least predicted error at each budget of bytes, and at each budget of time; as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..calibration.plot import pyplot, save_figure
from ..progress import progress_bar
from .exact import Allocation, allocate, least
from .table import KEEP, Table

POINTS = 16


def front(table: Table, points: int = POINTS) -> dict[str, list[Allocation]]:
    """ "bytes" and "latency" -> choices under evenly spaced budgets of one alone, from the least to that of full
    precision. A choice that a smaller budget gave already is left out."""
    whole = table.uniform(KEEP)
    ends = {"bytes": (least(table, table.bytes), table.size), "latency": (least(table, table.times), table.latency)}
    found: dict[str, list[Allocation]] = {}
    for kind, (smallest, share) in ends.items():
        found[kind] = []
        budgets = np.linspace(share(smallest) * (1 + 1e-6), share(whole), points)
        for budget in progress_bar(budgets, desc=f"front of {kind}", unit="budget"):
            one = allocate(table, **{"size" if kind == "bytes" else kind: float(budget)})
            if not found[kind] or one.error < found[kind][-1].error:
                found[kind].append(one)
    return found


def plot(
    table: Table, fronts: Mapping[str, list[Allocation]], chosen: Allocation, title: str, path: str | Path
) -> None:
    """Draw both fronts into a PNG: formats that all layers share as points, the choice as a star.

    Raises UserError where matplotlib is missing, or the file cannot be written.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for panel, kind in zip(axes, ("bytes", "latency"), strict=True):
        line = fronts[kind]
        panel.plot([getattr(one, kind) for one in line], [one.error for one in line], ".-", label="least error")
        for label in table.labels:
            if label != KEEP:
                picks = table.uniform(label)
                share = table.size(picks) if kind == "bytes" else table.latency(picks)
                panel.plot([share], [table.error(picks)], "o", label=label)
        panel.plot([getattr(chosen, kind)], [chosen.error], "k*", markersize=13, label="chosen")
        panel.set_xlabel("bytes, of the model in 16 bits" if kind == "bytes" else f"time of a step, {table.device}")
        panel.set_yscale("log")
    axes[0].set_ylabel("predicted error of the prediction")
    axes[0].set_title(title)
    axes[1].legend(fontsize=7)
    save_figure(figure, path)
