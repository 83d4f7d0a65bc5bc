"""One picture of all methods: error against stored bytes, and against the measured time of a step.

    python scripts/comparisons/pareto.py --output assets/pictures/pareto.png

Reads scripts/results alone: methods-*.json, ohq-*.json and, where it is there, methods-times-*.json, rows whose
steps were timed one by one on a quiet machine (one of each format, so that few are trained or searched for):

    taskset -c 0,1 python scripts/comparisons/compare_methods.py --device cpu --model unet-cifar10 --steps 2
        --num-paired 8 --calibration-samples 8 --batch-size 8 --timed-batch 8 --timed-steps 15
        --rows "RTN W?A8" "RTN W8A8, dynamic" "RTN W4A8*" "PTQ4DM W4A8 per row, mse, dynamic, nearest"
        "PTQ4DM W4A8 g64, gptq, dynamic" "PTQ4DM W4.5A8 rows, nearest" "QoQ W4A8*, every pass off" "QoQ W4A8 g128"
        "MixPE W4A8 g128" "MixPE W4A16 g128" "SVDQuant W4A?" "MixLLM W4.4A8 g128, nearest" "LUT-GEMM q2 g128"
        "SplitQuant W2" --output out/methods-times-cpu-unet-cifar10.json

A row without a time of its own takes that of layers of the same formats: the same kernels run. The line joins methods
and baselines that a kernel computes and no other beats. Shuffled controls are not drawn.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palette import few_colours
from pareto_points import Point, front, points_of

import ptq4dm.methods  # noqa: F401  registers them
import ptq4dm.svdquant  # noqa: F401
from ptq4dm.calibration.plot import pyplot, save_figure
from ptq4dm.errors import run
from ptq4dm.quantization.recipe import METHODS

MODELS = {"unet-cifar10": "UNet", "dit-cifar10": "DiT"}
COLOURS = {
    "rtn": "#8a8f98", "ptq4dm": "#3b7dd8", "gradptq": "#e08214", "svdquant": "#1b9e77", "pdquant": "#a05ab4",
    "qoq": "#d6455d", "mixpe": "#8c6d46", "ohq": "#111827", "mixllm": "#c2a500", "lutgemm": "#17a2b8",
    "splitquant": "#d16ba5",
}  # fmt: skip
OTHERS = ("#5f6b3a", "#6a51a3", "#99582a")  # of methods that come later
NAMES = {"pdquant": "PD-Quant", "lutgemm": "LUT-GEMM"}
TEXT, LINES, GRID = "#1f2937", "#4b5563", "#e5e7eb"
STYLE = {"font.size": 9, "axes.edgecolor": LINES, "text.color": TEXT, "axes.labelcolor": TEXT}
LARGE = ("method", "baseline")
TICKS = (0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)  # of bytes
BASELINE = {"marker": "s", "ms": 6}
APART = 8  # of a number from its point, in pixels
BESIDE = 0.45  # bytes that the names reach to
LINE = 0.038  # of the list of names, of the axes' height


def title(method: str) -> str:
    """A method's name as the paper has it."""
    return NAMES.get(method, METHODS[method].__name__.removesuffix("Config"))


def missing(points: list[Point]) -> list[str]:
    """Registered methods that are no point."""
    here = {point.method for point in points}
    return sorted(title(name) for name in METHODS if name not in here and not METHODS[name].loaded_only)


def draw(path: Path, models: dict[str, str] = MODELS) -> dict[str, list[Point]]:
    """The points of each model, drawn into a PNG. Raises UserError where it cannot be written."""
    plt = pyplot()
    found = {model: points_of(model) for model in models}
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11.5, 0.9 + 4.1 * len(models)))
        grid = figure.add_gridspec(1 + len(models), 2, height_ratios=[0.13, *(1 for _ in models)])
        _legend(figure.add_subplot(grid[0, :]), [point for points in found.values() for point in points])
        numbered: list[tuple[Any, list[tuple[Point, float]]]] = []
        for row, (model, points) in enumerate(found.items(), 1):
            left = figure.add_subplot(grid[row, 0])
            right = figure.add_subplot(grid[row, 1], sharey=left)
            lines = [
                (left, panel(left, points, lambda point: point.bytes, "stored bytes, of float16's")),
                (right, panel(right, points, lambda point: point.time, "time of a step, of float32's")),
            ]
            left.set(xscale="log", xticks=TICKS, xticklabels=map(str, TICKS), xlim=(TICKS[0] * 0.92, 1.0))
            left.minorticks_off()
            right.axvline(1, color=LINES, lw=0.8, ls=":")
            left.set_ylabel("error of the noise prediction")
            left.set_title(models[model], loc="left", fontweight="bold", fontsize=12)
            left.set_ylim(*_limits(points, max(len(best) for _, best in lines)))
            numbered += lines
        figure.tight_layout()
        for axes, best in numbered:  # once it is known where points lie
            _numbers(axes, best)
        save_figure(figure, path)
    few_colours(path)
    return found


def _limits(points: list[Point], names: int) -> tuple[float, float]:
    """Errors that the axes reach from and to: with room for so many names beneath what has few bytes."""
    large = [point for point in points if point.kind in LARGE]
    top = math.log10(max(point.error for point in large) * 1.8)
    above = math.log10(min(point.error for point in large if point.bytes < BESIDE) / 2)
    room = LINE * names + 0.05
    low = min((above - room * top) / (1 - room), math.log10(min(point.error for point in large) / 3))
    return 10**low, 10**top


def panel(axes, points: list[Point], cost: Callable[[Point], float | None], label: str) -> list[tuple[Point, float]]:
    """Rows by kind: methods large, baselines square, ablations small; open where the arithmetic is simulated. Gives
    what the line joins."""
    drawn = [(point, cost(point)) for point in points if cost(point) is not None and point.kind != "shuffled"]
    for point, place in sorted(drawn, key=lambda pair: pair[0].kind != "ablation"):
        colour, large = colour_of(point.method), point.kind == "method"
        mark = "*" if point.method == "ohq" else "s" if point.kind == "baseline" else "o"
        size = 13 if mark == "*" else 8 if large else 5.5 if point.kind == "baseline" else 3.5
        faces = {"mec": colour, "mew": 1.2, "mfc": "white"} if point.simulated else {"mew": 0.6, "mfc": colour}
        pale = 0.45 if point.kind == "ablation" else 0.95
        axes.plot(place, point.error, mark, ms=size, **{"mec": "white", **faces}, alpha=pale, zorder=4)
    best = front([(one, place) for one, place in drawn if not one.simulated and one.kind in LARGE])
    if best:
        axes.plot(
            [place for _, place in best], [point.error for point, _ in best], drawstyle="steps-post", color=LINES,
            lw=1, alpha=0.7, zorder=1,
        )  # fmt: skip
    axes.set(yscale="log", xlabel=label)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.06, y=0.08)
    return best


def _numbers(axes, best: list[tuple[Point, float]]) -> None:
    """Numbers along the line, and their names beneath it, in the corner where no point can be."""
    if not best:
        return
    to_points = axes.transData.transform
    last = (-math.inf, math.inf)
    for number, (point, place) in enumerate(best, 1):
        x, y = to_points((place, point.error))
        x, y = x - APART, y - APART
        if x - last[0] < 1.5 * APART:
            y = min(y, last[1] - 1.5 * APART)
        last = x, y
        axes.annotate(
            str(number), axes.transData.inverted().transform((x, y)), fontsize=7.5, ha="center", va="center",
            color=colour_of(point.method), fontweight="bold", zorder=6,
        )  # fmt: skip
    for number, (point, _) in enumerate(reversed(best)):
        axes.text(
            0.02, 0.03 + LINE * number, f"{len(best) - number}  {point.name}", fontsize=7, transform=axes.transAxes,
            color=colour_of(point.method), zorder=3,
        )  # fmt: skip


def _legend(axes, points: list[Point]) -> None:
    """Colours are methods, marks are kinds of rows; who has no point is named."""
    from matplotlib.lines import Line2D

    kinds = {
        "baseline": BASELINE,
        "an idea taken out": {"marker": "o", "ms": 4, "alpha": 0.5},
        "simulated": {"marker": "o", "ms": 8, "mfc": "white"},
    }
    marks = method_marks(points)
    marks += [Line2D([], [], ls="", color=LINES, label=label, **style) for label, style in kinds.items()]
    axes.axis("off")
    axes.legend(handles=marks, loc="upper center", ncols=7, frameon=False, fontsize=9)
    untimed = {point.method for point in points} - {point.method for point in points if point.time is not None}
    notes = {
        "times of": list(dict.fromkeys(point.device for point in points if point.device)),
        "without a measured time": sorted(title(name) for name in untimed),
        "not measured in these tables": missing(points),
    }
    text = "; ".join(
        f"{what}: {' and '.join(names) if what == 'times of' else ', '.join(names)}"
        for what, names in notes.items()
        if names
    )
    axes.text(0.5, -0.25, text, ha="center", va="top", fontsize=8, transform=axes.transAxes)


def method_marks(points: list[Point]) -> list[Any]:
    """Marks of a legend for the methods of some points."""
    from matplotlib.lines import Line2D

    here = [name for name in COLOURS if any(point.method == name for point in points)]
    here += sorted({point.method for point in points} - set(here))
    return [
        Line2D([], [], ls="", marker="*" if name == "ohq" else "o", ms=9, color=colour_of(name), label=title(name))
        for name in here
    ]


def colour_of(method: str) -> str:
    later = sorted(name for name in METHODS if name not in COLOURS)
    return COLOURS.get(method) or OTHERS[later.index(method) % len(OTHERS)]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("assets/pictures/pareto.png"))
    args = parser.parse_args(words)
    for model, points in draw(args.output).items():
        timed = {point.method for point in points if point.time is not None}
        print(f"{model}: {len(points)} points; no measured time: ", end="")
        print(", ".join(sorted({title(point.method) for point in points if point.method not in timed})) or "none")
    print(f"picture: {args.output}")


if __name__ == "__main__":
    run(main)
