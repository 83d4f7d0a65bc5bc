"""The table that papers on quantized diffusion models print, in Markdown: FID, IR, LPIPS, PSNR, SSIM; and CLIP.

One row a model; a cell that nothing was measured for is empty, and a line below says what would fill it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .measures import LABELS
from .paired import reach_of

COLUMNS = ("frechet", "image_reward", "clip", "lpips", "psnr", "ssim")  # as the papers order them, CLIP put in
DIGITS = {"frechet": 2, "image_reward": 3, "clip": 2, "lpips": 3, "psnr": 2, "ssim": 3}
DIRECTIONS = "lower is better: FID, LPIPS; higher: IR, CLIP, PSNR, SSIM"
INTERVAL = "the ends of the 95 % interval over seeds, within what a figure can be"
FEW = 5  # seeds: of fewer an interval says little

Figure = Mapping[str, Any]  # "mean", and "interval" where there is one, as `mean_interval` gives them


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned; the first is of names, the others of numbers."""
    wide = [max(len(row[k]) for row in [columns, *rows]) for k in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return (
            f"| {cells[0]:<{wide[0]}} | "
            + " | ".join(f"{c:>{w}}" for c, w in zip(cells[1:], wide[1:], strict=True))
            + " |"
        )

    rule = "|" + "-" * (wide[0] + 2) + "|" + "|".join("-" * (w + 1) + ":" for w in wide[1:]) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def cell(name: str, value: float | None) -> str:
    """A figure with its usual digits; "" for none."""
    return "" if value is None else f"{value:.{DIGITS[name]}f}"


def ends(name: str, figure: Figure) -> str:
    """The ends of a figure's interval, "26.55 to 32.42"; "" where it has none."""
    interval = figure.get("interval")
    return f"{cell(name, interval[0])} to {cell(name, interval[1])}" if interval else ""


def _told(name: str, figure: Figure) -> str:
    reach = ends(name, figure)
    return cell(name, figure.get("mean")) + (f" ({reach})" if reach else "")


def published_table(rows: Mapping[str, Mapping[str, Figure]], frechet: str = "FID") -> str:
    """name of a model -> figure -> its mean and interval, as the published table, "29.48 (26.55 to 32.42)".

    frechet: the label of the Frechet distance.
    """
    head = ["", *((LABELS | {"frechet": frechet})[name] for name in COLUMNS)]
    return markdown(
        head, [[name, *(_told(key, found.get(key, {})) for key in COLUMNS)] for name, found in rows.items()]
    )


def directions(rows: Mapping[str, Mapping[str, Figure]], seeds: int) -> str:
    """What stands below the table: which figures are better low, what stands in brackets, if anything does, and
    whether the seeds are too few for it."""
    figures = [found[key] for found in rows.values() for key in COLUMNS if "interval" in found.get(key, {})]
    if not figures:
        return DIRECTIONS
    if seeds == 1:
        return f"{DIRECTIONS}; one seed has no interval: give more"
    wide = f"; of {seeds} seeds it reaches {reach_of(seeds):.1f} standard errors to either side: give more"
    return f"{DIRECTIONS}; in brackets {INTERVAL}{wide if seeds < FEW else ''}"


def not_measured_text(missing: Mapping[str, str]) -> str:
    """ "not measured: LPIPS (--lpips-weights FILE), ...", or "" """
    told = ", ".join(f"{LABELS[name]} ({why})" for name, why in missing.items())
    return f"not measured: {told}" if told else ""


def rows_of(report: Mapping[str, Any]) -> dict[str, dict[str, Figure]]:
    """The rows of an `evaluate` report: the model's, and its original's where one of its figures is known."""
    prompts, paired = report.get("prompts", {}), report.get("paired", {})

    ours = {
        **prompts.get("model", {}),
        "frechet": {"mean": report["frechet"]["value"]} if "frechet" in report else {},
    }
    ours |= {"psnr": {"mean": paired["psnr_db"], "interval": paired["psnr_interval"]}} if paired else {}
    ours |= {key: paired[key] for key in ("ssim", "lpips") if key in paired}
    rows = {"full precision": prompts["full_precision"]} if prompts.get("full_precision") else {}
    return {**rows, "quantized" if paired else "samples": ours}
