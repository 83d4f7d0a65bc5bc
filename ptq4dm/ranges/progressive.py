"""Progressive grids of weights (kernels/formats/progressive.py): which whole step each group gets.

Under "max" a step is the paper's, round(range / 15). Other objectives choose among the smaller whole numbers, which
clip both ends of a group by one share; the scale of a row stays the one that its largest weight gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..evidence import LayerEvidence
from ..kernels.formats.exact import over
from ..kernels.formats.progressive import ProgressiveGrid, first_scales, whole_steps, zero_points
from .weights import WeightRows, chosen_scales


@dataclass
class ProgressiveRows(WeightRows):
    """Groups [R, C] of w / s0. Scales that objectives try are steps, of which the nearest whole number counts."""

    def __post_init__(self) -> None:
        codes = self.rows.round()
        self.low, high = codes.amin(1).clamp(max=0), codes.amax(1).clamp(min=0)
        self.full = whole_steps(over(high - self.low, 15))

    def zeros(self) -> Tensor:
        """Zero points [R]: those of the full range, whatever is clipped."""
        return zero_points(self.low, self.full)

    def errors(self, scale: Tensor) -> Tensor:
        """w - Q(w) in units of the scale [R] that is asked for, [R, C]."""
        whole = whole_steps(scale)
        return super().errors(whole) * (whole / scale)[:, None]


def progressive_grid(
    weight: Tensor,
    objective: str = "max",
    parameter: float | None = None,
    group_size: int | None = None,
    evidence: LayerEvidence | None = None,
) -> ProgressiveGrid:
    """The progressive grid of a weight [N, K] float; arguments, and what is raised, are those of `weight_grid`."""
    weight = weight.float()
    channel = first_scales(weight)
    groups = 1 if group_size is None else weight.shape[1] // group_size
    rows = ProgressiveRows((weight / channel.float()).reshape(len(weight) * groups, -1), 4, True, groups)
    steps = whole_steps(chosen_scales(rows, objective, parameter, evidence))
    return ProgressiveGrid.over(channel, steps.view(-1, groups), rows.zeros().to(torch.int32).view(-1, groups))
