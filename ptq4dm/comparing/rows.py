"""A report's figures as the cells of tables, on the screen and on the page."""

from __future__ import annotations

from typing import Any

from ..evaluation.published import Figure


def published_rows(report: dict) -> dict[str, dict[str, Figure]]:
    """Label -> figure -> its mean and interval, as the published table has them."""
    return {
        label: {**entry["figures"], "frechet": {"mean": entry["frechet"]["value"]} if "frechet" in entry else {}}
        for label, entry in report["models"].items()
    }


def frechet_label(report: dict) -> str:
    """ "FID" or "feature-FID"."""
    return next((entry["frechet"]["label"] for entry in report["models"].values() if "frechet" in entry), "FID")


def costs(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, text) of an entry's bytes, share of full precision, speed and epsilon error; "" where not measured.

    Bytes are those of all networks of the pipeline, as its pictures are; the other two are of the denoiser.
    """
    timed, error = entry.get("step_time"), entry.get("epsilon_error")
    before, after = (sum(column) for column in zip(*entry["memory"].values(), strict=True))
    speed = "" if timed is None else f"{timed['speedup']:.2f}"
    if timed and "milliseconds" in timed:
        speed += f" ({timed['milliseconds']:.3g} ms)"
    return [
        ("MB, all networks", f"{after / 1e6:.2f}"),
        ("share of bytes", f"{after / before:.1%}"),
        ("speed of a step", speed),
        ("epsilon error", "" if error is None else f"{error['overall']:.2e}"),
    ]


def sizes_text(report: dict) -> str:
    """Whose bytes the table has: "bytes are of all networks: unet, vae"."""
    names = dict.fromkeys(name for entry in report["models"].values() for name in entry["memory"])
    return f"bytes are of all networks: {', '.join(names)}"
