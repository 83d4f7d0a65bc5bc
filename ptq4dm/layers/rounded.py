"""From a float weight to codes and the grid that they are on: what the layers of all uniform formats share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..evidence import LayerEvidence
from ..rounding.registry import ROUNDERS


def rounded(
    weight: Tensor,
    grid_of: Callable[[Tensor, LayerEvidence | None], Any],
    rounding: str,
    evidence: LayerEvidence | None,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes [N, K], scales [N, G], zeros [N, G] or None) of a weight [N, K] float32.

    grid_of: (weight, evidence) -> its grid. rounding: the rounder's name. groups: of a grouped convolution, each
    of which has N / groups outputs and inputs of its own: evidence is of all groups' inputs, one after the other.
    """
    rounder = ROUNDERS.find(rounding)
    parts = 1 if evidence is None else groups
    count, width = len(weight) // parts, weight.shape[1]
    found = []
    for i in range(parts):
        rows = weight[i * count : (i + 1) * count]
        fed = evidence
        if evidence is not None and parts > 1:
            fed = evidence.columns(slice(i * width, (i + 1) * width))
        grid = grid_of(rows, fed)
        found.append((rounder(rows, grid, fed), grid.scales, getattr(grid, "zeros", None)))
    codes, scales, zeros = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)
