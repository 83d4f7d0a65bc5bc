"""Static grids of activations, one for a layer's whole input, under a range objective.

    x ~ s (q - z),  q in [-2^(b-1), 2^(b-1) - 1];  the grid covers zero

Objectives score a histogram of all values that calibration saw; those that need more get rows of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UserError
from ..evidence import LayerEvidence
from ..kernels.formats.int8 import affine_grids, affine_parameters
from .registry import OBJECTIVES, objective_parameter


@dataclass
class InputValues:
    """What a layer is fed, and the grids that it can have.

    histogram: [n] counts of values in n equal bins over [-limit, limit]; low <= 0 <= high: the extremes.
    weight: [N, K] float of the layer, for objectives that look at its output; else None.
    """

    histogram: Tensor
    limit: float
    low: float
    high: float
    bits: int
    symmetric: bool
    weight: Tensor | None = None

    def grid(self, low: float, high: float) -> tuple[float, int]:
        """The scale and zero point of the grid over [low, high]."""
        return affine_parameters(low, high, self.bits, self.symmetric)

    def grids(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """The scales and zero points of the grids over ranges whose ends are [R] float64 each; both [R] float64."""
        return affine_grids(lows, highs, self.bits, self.symmetric)

    def rounded(self, x: Tensor, scale: float, zero: int) -> Tensor:
        """What the codes of x stand for on a grid, in the type of x."""
        half = 2 ** (self.bits - 1)
        return ((x / scale).round_().add_(zero).clamp_(-half, half - 1) - zero) * scale

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """(the centres of the bins that hold something, their counts), float64."""
        counts = self.histogram.double()
        n = len(counts)
        places = torch.arange(n, dtype=torch.float64, device=counts.device) + 0.5
        centres = places * (2 * self.limit / n) - self.limit
        used = counts > 0
        return centres[used].clamp_(self.low, self.high), counts[used]


def activation_grid(
    histogram: Tensor,
    limit: float,
    low: float,
    high: float,
    bits: int,
    objective: str = "max",
    parameter: float | None = None,
    symmetric: bool = False,
    evidence: LayerEvidence | None = None,
    weight: Tensor | None = None,
) -> tuple[float, int]:
    """The scale and zero point of a static activation grid.

    Args:
        histogram: [n] counts of values in n equal bins over [-limit, limit].
        low, high: the exact extremes.
        evidence, weight [N, K]: what the layer is fed and its weight, for objectives that need them.

    Raises UserError for an objective that is unknown or needs evidence that is not there.
    """
    parameter = objective_parameter(objective, parameter)
    chosen = OBJECTIVES.find(objective)
    if chosen.needs and (evidence is None or weight is None):
        raise UserError(f"the objective '{objective}' looks at what layers are fed; give a calibration store.")
    inputs = InputValues(histogram, limit, min(low, 0.0), max(high, 0.0), bits, symmetric, weight)
    if inputs.low == inputs.high:
        return inputs.grid(inputs.low, inputs.high)
    return chosen.input(inputs, parameter, evidence)
