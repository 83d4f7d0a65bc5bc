"""A report's figures as the cells of tables, on the screen and on the page."""

from __future__ import annotations

from typing import Any


def published_rows(report: dict) -> dict[str, dict[str, float | None]]:
    """Label -> figure -> mean, as the published table has it."""
    return {
        label: {name: one["mean"] for name, one in entry["figures"].items()}
        | {"frechet": entry["frechet"]["value"] if "frechet" in entry else None}
        for label, entry in report["models"].items()
    }


def frechet_label(report: dict) -> str:
    """ "FID" or "feature-FID"."""
    return next((entry["frechet"]["label"] for entry in report["models"].values() if "frechet" in entry), "FID")


def costs(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, text) of an entry's bytes, share of full precision, speed and epsilon error; "" where not measured."""
    size, timed, error = entry["bytes"], entry.get("step_time"), entry.get("epsilon_error")
    share = size["model"] / size["full_precision"]
    speed = "" if timed is None else f"{timed['speedup']:.2f}"
    if timed and "milliseconds" in timed:
        speed += f" ({timed['milliseconds']:.3g} ms)"
    return [
        ("MB", f"{size['model'] / 1e6:.2f}"),
        ("share of bytes", f"{share:.1%}"),
        ("speed of a step", speed),
        ("epsilon error", "" if error is None else f"{error['overall']:.2e}"),
    ]
