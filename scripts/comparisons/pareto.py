"""One picture of all methods: error against stored bytes, and against the measured time of a step.

    python scripts/comparisons/pareto.py --output assets/pictures/pareto.png

Reads scripts/results alone: methods-*.json, ohq-*.json and, where it is there, methods-times-*.json, rows whose
steps were timed one by one on a quiet machine:

    taskset -c 0,1 python scripts/comparisons/compare_methods.py --device cpu --model unet-cifar10 --steps 2 \\
        --num-paired 8 --calibration-samples 8 --batch-size 8 --timed-batch 8 --kinds method baseline \\
        --rows "RTN*" "PTQ4DM*" "SVDQuant*" "QoQ*" "MixPE*" "MixLLM*" --output out/methods-times-cpu-unet-cifar10.json

A row without a time of its own takes that of layers of the same formats: the same kernels run. The line joins methods
and baselines that a kernel computes and no other beats. Shuffled controls are not drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from pareto_points import Point, front, points_of
from PIL import Image

import ptq4dm.methods  # noqa: F401  registers them
import ptq4dm.svdquant  # noqa: F401
from ptq4dm.calibration.plot import pyplot, save_figure
from ptq4dm.errors import run
from ptq4dm.files.atomic import replacing
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
LARGE = ("method", "baseline")
COLOURS_OF_A_PICTURE = 224
NEAR = 0.06  # costs of neighbours on the line whose labels are stacked
STEP = 1.45  # between stacked labels, as a ratio of errors


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
    with plt.rc_context({"font.size": 9, "axes.edgecolor": LINES, "text.color": TEXT, "axes.labelcolor": TEXT}):
        figure = plt.figure(figsize=(11.5, 0.9 + 4.1 * len(models)))
        grid = figure.add_gridspec(1 + len(models), 2, height_ratios=[0.13, *(1 for _ in models)])
        _legend(figure.add_subplot(grid[0, :]), [point for points in found.values() for point in points])
        for row, (model, points) in enumerate(found.items(), 1):
            left = figure.add_subplot(grid[row, 0])
            right = figure.add_subplot(grid[row, 1], sharey=left)
            where = " and ".join(dict.fromkeys(point.device for point in points if point.device))
            _panel(left, points, lambda point: point.bytes, "stored bytes, of float16's")
            _panel(right, points, lambda point: point.time, f"time of a step, of float32's ({where})")
            right.axvline(1, color=LINES, lw=0.8, ls=":")
            left.set_ylabel("error of the noise prediction")
            left.set_title(models[model], loc="left", fontweight="bold", fontsize=12)
            large = [point.error for point in points if point.kind in LARGE]
            left.set_ylim(min(large) / 4, max(large) * 1.6)
        save_figure(figure, path)
    _few_colours(path)
    return found


def _few_colours(path: Path) -> None:
    """Write a picture again, with a palette: a third of the bytes."""
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(COLOURS_OF_A_PICTURE, method=Image.Quantize.MEDIANCUT)
    with replacing(path) as temporary:
        few.save(temporary, format="png", optimize=True)


def _panel(axes, points: list[Point], cost: Callable[[Point], float | None], label: str) -> None:
    """Rows by kind: methods large, baselines square, ablations small; open where the arithmetic is simulated."""
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
        _labels(axes, best)
    axes.set(yscale="log", xlabel=label)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.06, y=0.08)


def _labels(axes, best: list[tuple[Point, float]]) -> None:
    """Names beneath the line, where no point is; of neighbours the first is the lowest: no leader meets a name."""
    stacks = [[best[0]]]
    for before, one in pairwise(best):
        if one[1] - before[1] < NEAR:
            stacks[-1].append(one)
        else:
            stacks.append([one])
    for stack in stacks:
        least = min(point.error for point, _ in stack)
        for number, (point, place) in enumerate(reversed(stack)):
            height = least * 0.68 / STEP**number
            axes.annotate(
                point.name, (place, point.error), (place + 0.004, height), va="center", fontsize=8,
                color=colour_of(point.method), zorder=3,
                bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85},
                arrowprops={"arrowstyle": "-", "color": colour_of(point.method), "lw": 0.6, "relpos": (0, 0.5)},
            )  # fmt: skip


def _legend(axes, points: list[Point]) -> None:
    """Colours are methods, marks are kinds of rows; who has no point is named."""
    from matplotlib.lines import Line2D

    here = [name for name in COLOURS if any(point.method == name for point in points)]
    here += sorted({point.method for point in points} - set(here))
    kinds = {
        "baseline": {"marker": "s", "ms": 6},
        "an idea taken out": {"marker": "o", "ms": 4, "alpha": 0.5},
        "simulated": {"marker": "o", "ms": 8, "mfc": "white"},
    }
    marks = [
        Line2D([], [], ls="", marker="*" if name == "ohq" else "o", ms=9, color=colour_of(name), label=title(name))
        for name in here
    ]
    marks += [Line2D([], [], ls="", color=LINES, label=label, **style) for label, style in kinds.items()]
    axes.axis("off")
    axes.legend(handles=marks, loc="upper center", ncols=6, frameon=False, fontsize=9)
    untimed = {point.method for point in points} - {point.method for point in points if point.time is not None}
    notes = {
        "without a measured time": sorted(title(name) for name in untimed),
        "not measured in these tables": missing(points),
    }
    text = "; ".join(f"{what}: {', '.join(names)}" for what, names in notes.items() if names)
    axes.text(0.5, -0.25, text, ha="center", va="top", fontsize=8, transform=axes.transAxes)


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
