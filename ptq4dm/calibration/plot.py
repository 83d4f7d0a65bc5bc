"""A layer's input over timesteps: why calibration has to know about t."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..files.atomic import replacing
from .store import CalibrationStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.001, 0.25, 0.75, 0.999)


def layer_ranges(store: CalibrationStore, layer: str) -> list[dict]:
    """A row per timestep bin that has samples: from, to (timesteps), low, high and QUANTILES of the input."""
    num_bins, total = store.config["num_bins"], store.num_train_timesteps
    rows = []
    for index in range(num_bins):
        histogram, limit, low, high = store.input_of(layer, [index])
        if not histogram.any():
            continue
        n = len(histogram)
        share = histogram.cumsum(0).double() / histogram.sum()
        edges = [2 * limit * int(torch.searchsorted(share, q)) / n - limit for q in QUANTILES]
        rows.append(
            {"from": index * total / num_bins, "to": (index + 1) * total / num_bins, "low": low, "high": high}
            | {"quantiles": [min(max(edge, low), high) for edge in edges]}  # a histogram's bin may reach past them
        )
    return rows


def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing into files. Raises UserError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plotting needs matplotlib; install it with `pip install ptq4dm[plot]`.") from None
    return plt


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure into a PNG, whose folder is made, and close it. Raises UserError if it cannot be written."""
    path = Path(path)
    try:
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from None
    finally:
        pyplot().close(figure)


def plot_ranges(store: CalibrationStore, layer: str, path: str | Path) -> None:
    """Draw the extremes and quantiles of a layer's input over timesteps into a PNG.

    Raises:
        UserError: matplotlib is missing, the layer is unknown, or the file cannot be written.
    """
    plt = pyplot()
    if layer not in store.fingerprint:
        raise UserError(f"the model has no layer '{layer}' to plot; `ptq4dm info` lists its layers.")
    rows = [row for row in layer_ranges(store, layer) for _ in range(2)]  # a bin's left and right end: a stair
    if not rows:
        raise UserError(f"layer '{layer}' was fed nothing during calibration; there is nothing to plot.")
    times = [row["to" if k % 2 else "from"] for k, row in enumerate(rows)]
    quantiles = list(zip(*(row["quantiles"] for row in rows), strict=True))
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.fill_between(times, [r["low"] for r in rows], [r["high"] for r in rows], alpha=0.2, label="all values")
    axes.fill_between(times, quantiles[0], quantiles[3], alpha=0.35, label="99.8 %")
    axes.fill_between(times, quantiles[1], quantiles[2], alpha=0.6, label="50 %")
    axes.set_xlabel("timestep (noise grows to the right)")
    axes.set_ylabel("input value")
    axes.set_title(layer)
    axes.legend()
    save_figure(figure, path)
