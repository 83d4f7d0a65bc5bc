"""Grids of weights: scales, and zero points where they are affine, under a range objective.

    symmetric   s = f max|w| / limit,              q in [-limit, limit],          limit = 2^(b-1) - 1
    affine      s = f (max w - min w) / (2^b - 1), q in [-2^(b-1), 2^(b-1) - 1],  z = round(-min w / s_1) - 2^(b-1)

s_1 is the scale of f = 1. Each row of a weight [N, K], or each group of `group_size` inputs of a row, has a scale of
its own; f in (0, 1] is what an objective chooses for it. A row of nothing but zeros gets scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..evidence import LayerEvidence
from ..kernels.formats.exact import over
from ..kernels.formats.grid import Grid
from ..kernels.formats.int8 import weight_limit
from .registry import OBJECTIVES, objective_parameter, weights_need


@dataclass
class WeightRows:
    """The rows that are to get a scale each, and the grids that they can have.

    rows: [R, C] float32, with R = N or N groups.
    groups: groups of a row of the weight, R / N.
    """

    rows: Tensor
    bits: int
    affine: bool
    groups: int = 1

    def __post_init__(self) -> None:
        if self.affine:
            self.low, high = self.rows.amin(1).clamp(max=0), self.rows.amax(1).clamp(min=0)
            self.full = over(high - self.low, 2**self.bits - 1)
        else:
            self.full = over(self.rows.abs().amax(1), self.limit)

    @property
    def limit(self) -> int:
        """The largest code of a symmetric grid."""
        return weight_limit(self.bits)

    def errors(self, scale: Tensor) -> Tensor:
        """w - Q(w) in units of the scale, [R, C], under scales [R]."""
        scale = torch.where(scale > 0, scale, 1.0)[:, None]
        steps = self.rows / scale
        if not self.affine:
            return steps - steps.round().clamp_(-self.limit, self.limit)
        zero, half = self.zeros()[:, None], 2 ** (self.bits - 1)
        return steps - ((steps.round() + zero).clamp_(-half, half - 1) - zero)

    def rounded(self, scale: Tensor) -> Tensor:
        """Q(w) [R, C] under scales [R]."""
        return self.rows - self.errors(scale) * torch.where(scale > 0, scale, 1.0)[:, None]

    def zeros(self) -> Tensor:
        """Zero points [R] of affine grids: both ends of a range are clipped by one fraction, which moves no zero."""
        return torch.where(self.full > 0, -self.low / self.full, 0.0).round() - 2 ** (self.bits - 1)


def weight_grid(
    weight: Tensor,
    bits: int,
    objective: str = "max",
    parameter: float | None = None,
    group_size: int | None = None,
    affine: bool = False,
    evidence: LayerEvidence | None = None,
) -> Grid:
    """The grid of a weight [N, K] float: scales [N, G] float32, zeros [N, G] int32 or None.

    group_size: inputs per scale; None gives each row one. evidence: what the layer is fed, where objectives need it.

    Raises UserError for an objective that is unknown or needs evidence that is not there.
    """
    weight = weight.float()
    count = len(weight)
    groups = 1 if group_size is None else weight.shape[1] // group_size
    rows = WeightRows(weight.reshape(count * groups, -1), bits, affine, groups)
    scale = chosen_scales(rows, objective, parameter, evidence)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    zeros = None
    low, high = -rows.limit, rows.limit
    if affine:
        zeros = rows.zeros().int().view(count, groups)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return Grid(scale.view(count, groups), zeros, low, high)


def chosen_scales(
    rows: WeightRows, objective: str, parameter: float | None, evidence: LayerEvidence | None
) -> Tensor:
    """Scales [R] that an objective chooses for rows. Raises UserError as `weight_grid` does."""
    chosen = OBJECTIVES.find(objective)
    if evidence is None and weights_need(objective):
        raise UserError(f"the objective '{objective}' looks at what layers are fed; give a calibration store.")
    return chosen.weight(rows, objective_parameter(objective, parameter), evidence)


def weight_scale(weight: Tensor, bits: int, objective: str = "max", parameter: float | None = None) -> Tensor:
    """Scales [N] float32 of symmetric per-channel codes for weight [N, ...] float; a zero row gets scale 1."""
    return weight_grid(weight.flatten(1), bits, objective, parameter).scales[:, 0]
