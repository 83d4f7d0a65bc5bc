"""The bench's figures as a table and as a picture with one line per sampler."""

from __future__ import annotations

import math
from pathlib import Path

from ...calibration.plot import pyplot, save_figure
from ...errors import UserError

LEAST = 1000  # images from which samplers that start from the same noise are ranked


def few_images(number: int) -> str | None:
    """What to say of figures of so many images, where they rank nothing."""
    if number >= LEAST:
        return None
    return (
        f"{number} images are fewer than {LEAST:,}: the feature-FID of so few is biased upwards and moves by chance, "
        "so these figures do not say which sampler is better."
    )


def table(rows: list[dict], best: bool = True) -> str:
    """A Markdown table: a line per sampler, a column per budget; with `best` the best of a column is in bold.

    A sampler that cannot use up a budget (Heun's method takes odd numbers) shows what it used in brackets.
    """
    budgets = sorted({row["budget"] for row in rows})
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    found = {(row["sampler"], row["budget"]): row for row in rows}
    figures = {b: [row["feature_fid"] for row in rows if row["budget"] == b] for b in budgets}
    lowest = {b: min(filter(math.isfinite, some), default=None) for b, some in figures.items()}  # NaN is never best

    def cell(name: str, budget: int) -> str:
        row = found.get((name, budget))
        if row is None:
            return ""
        text = f"{row['feature_fid']:.2f}"
        text = f"**{text}**" if best and row["feature_fid"] == lowest[budget] else text
        return text if row["evaluations"] == budget else f"{text} ({row['evaluations']})"

    lines = ["| sampler | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(name, b) for b in budgets) + " |" for name in names]
    return "\n".join(lines)


TICKS = tuple(round(k * 10.0**p, 4) for p in (-3, -2, -1, 0, 1, 2) for k in (1, 1.3, 1.6, 2, 2.5, 3, 4, 5, 6, 8))


def plot_rows(title: str, rows: list[dict], path: Path) -> bool:
    """feature-FID over evaluations, a line per sampler (diffusers' dashed); False without matplotlib."""
    try:
        plt = pyplot()
    except UserError:
        return False
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(9, 4.5))
    figures = [row["feature_fid"] for row in rows if math.isfinite(row["feature_fid"])] or [1.0]
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((r["evaluations"], r["feature_fid"]) for r in rows if r["sampler"] == name)
        theirs = name.startswith("diffusers/")
        axes.plot(*zip(*own, strict=True), "x--" if theirs else "o-", label=name, lw=1 if theirs else 2, ms=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    budgets = sorted({row["budget"] for row in rows})
    axes.set_xticks(budgets, map(str, budgets))
    low, high = 0.97 * min(figures), 1.05 * max(figures)
    ticks = [tick for tick in TICKS if low < tick < high]
    axes.set_yticks(ticks if len(ticks) < 16 else ticks[::3])
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("evaluations of the model")
    axes.set_ylabel("feature-FID")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(alpha=0.3)
    save_figure(figure, path)
    return True
