"""Picture of what the low-rank branch takes off 4 bits: singular values of a smoothed weight, and of the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..calibration.plot import pyplot, save_figure
from ..quantization.pictures import PICTURES, Picture
from .layers.plan import SVDQPlan
from .layers.svdq import _SVDQLayer


def singular_values(weight: Tensor, layer: _SVDQLayer) -> tuple[Tensor, Tensor]:
    """Two [min(N, K)], falling: of the smoothed weight and of the rest. weight: the original, [N, K, ...]."""
    smoothed = weight.detach().flatten(1).float()
    rest = smoothed
    down, up = layer.branch
    if down is not None:
        rest = smoothed - up.float() @ down.float()
    smoothed, rest = layer.plan.turned(smoothed), layer.plan.turned(rest)
    if layer.smooth is not None:
        smoothed, rest = smoothed * layer.smooth.float(), rest * layer.smooth.float()
    return torch.linalg.svdvals(smoothed).cpu(), torch.linalg.svdvals(rest).cpu()


def plot_branch(weight: Tensor, layer: _SVDQLayer, title: str, path: str | Path) -> None:
    """Draw both spectra into a PNG.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    plt = pyplot()
    before, after = singular_values(weight, layer)
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(range(1, len(before) + 1), before, label="smoothed weight")
    axes.plot(range(1, len(after) + 1), after, label=f"rest, after a branch of rank {layer.plan.rank}")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("singular value number")
    axes.set_ylabel("singular value")
    axes.set_title(title)
    axes.legend()
    save_figure(figure, path)


def has_branch(plan) -> bool:
    return isinstance(plan, SVDQPlan) and plan.rank > 0


PICTURES["svdquant"] = Picture("a low-rank branch", has_branch, lambda config: config.rank > 0, plot_branch)
