"""The project in one picture: error against bytes, error against time, feature-FID against evaluations.

    python scripts/comparisons/draw_overview.py --output assets/pictures/overview.png [--model dit-cifar10]

Reads scripts/results alone: points of pareto.py, of which methods and baselines that a kernel computes are drawn, and
means of three seeds of sampler_seeds.py (those that each kind has). The line joins what no other beats.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from palette import few_colours
from pareto import BASELINE, GRID, LARGE, LINES, STYLE, TICKS, method_marks, panel
from pareto_points import Point, points_of
from sampler_seeds import BUDGETS, KINDS, MODELS, best_means, rows_of

from ptq4dm.calibration.plot import pyplot, save_figure
from ptq4dm.errors import UserError, run

CURVES = {
    "fitted": ("a schedule fitted to the model", "#1b9e77"),
    "ours": ("ours by name, the best", "#3b7dd8"),
    "diffusers": ("diffusers' schedulers, the best", "#8a8f98"),
}
assert tuple(CURVES) == KINDS


def draw(path: Path, model: str) -> None:
    """The three panels of a model, drawn into a PNG. Raises UserError where a table holds nothing of it."""
    points = [point for point in points_of(model) if point.kind in LARGE and not point.simulated]
    found = rows_of(model)
    if not points or not found:
        raise UserError(f"scripts/results has no {'samplers' if points else 'methods'} of {model}.")
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11.5, 3.9))
        grid = figure.add_gridspec(2, 3, height_ratios=[1, 0.05], width_ratios=[1, 1, 1.05])
        left, middle, right = (figure.add_subplot(grid[0, column]) for column in range(3))
        panel(left, points, lambda point: point.bytes, "stored bytes, of float16's")
        panel(middle, points, lambda point: point.time, "time of a step on a CPU, of float32's")
        left.set(xscale="log", xticks=TICKS, xticklabels=map(str, TICKS), ylabel="error of the noise prediction")
        left.minorticks_off()
        middle.set_ylim(left.get_ylim())
        middle.axvline(1, color=LINES, lw=0.8, ls=":")
        _samplers(right, found)
        heads = ("too big? quantize", "too slow? kernels in 4 and 8 bits", "too many steps? fit a schedule")
        for axes, head in zip((left, middle, right), heads, strict=True):
            axes.set_title(head, loc="left", fontweight="bold", fontsize=10)
        _names(figure.add_subplot(grid[1, :]), points)
        save_figure(figure, path)
    few_colours(path)


def _samplers(axes: Any, found: dict) -> None:
    for kind, (label, colour) in CURVES.items():
        means = {budget: some[kind] for budget in BUDGETS if kind in (some := best_means(found, budget))}
        axes.plot(list(means), list(means.values()), "o-", ms=5, lw=1.6, color=colour, label=label)
    axes.set(xscale="log", xticks=BUDGETS, xticklabels=map(str, BUDGETS), ylabel="feature-FID, 10,000 images")
    axes.set(xlabel="evaluations of the model")
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8.5)


def _names(axes: Any, points: list[Point]) -> None:
    from matplotlib.lines import Line2D

    marks = [*method_marks(points), Line2D([], [], ls="", color=LINES, label="baseline", **BASELINE)]
    axes.axis("off")
    axes.legend(handles=marks, loc="center", ncols=len(marks), frameon=False, fontsize=8.5, handletextpad=0.1)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("assets/pictures/overview.png"))
    parser.add_argument("--model", choices=[*MODELS][:2], default="dit-cifar10")
    args = parser.parse_args(words)
    draw(args.output, args.model)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    run(main)
