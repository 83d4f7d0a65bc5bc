"""The power grid: steps that grow with the weight, w^a on a uniform grid.

    q    = clamp(round(sign(w) |w|^a / s), -limit, limit),    limit = 2^(b-1) - 1
    Q(w) = sign(q) (s |q|)^(1/a) = s^(1/a) sign(q) |q|^(1/a)

a in [0.5, 1] is the exponent of a whole layer, s [N] a scale for each output; a = 1 is the uniform grid. Which code
is taken is decided between steps, not between values. The idea of "PowerQuant: Automorphism Search for Non-Uniform
Quantization" (Yvinec et al., ICLR 2023). No product of integers gives this: values come from a codebook.

Powers are taken in float64 and rounded once, so that a CPU and a GPU get the same values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .grid import Grid
from .int8 import weight_limit

NEAR_ZERO = 1e-12
"""Below this a magnitude counts as it in |q|^(1/a - 1): that factor's own slope has no end at zero."""


@dataclass
class PowerGrid:
    """scales: [N, 1] float of sign(w) |w|^exponent; low, high: the first and the last code."""

    scales: Tensor
    exponent: float
    low: int
    high: int
    kind: ClassVar[str] = "power"

    @classmethod
    def over(cls, uniform: Grid, exponent: float) -> PowerGrid:
        """The power grid whose steps are those of a symmetric uniform grid of `raised` weights, one scale a row."""
        return cls(uniform.scales, exponent, uniform.low, uniform.high)

    def codes(self, weight: Tensor) -> Tensor:
        """Codes int8 [N, K] of weight [N, K] float; 0 for NaN."""
        return self.steps(weight).round_().clamp_(self.low, self.high).nan_to_num_(0.0).to(torch.int8)

    def steps(self, weight: Tensor) -> Tensor:
        """sign(w) |w|^a / s of weight [N, K], float32: what a rounder rounds up or down."""
        return raised(weight, self.exponent) / self.scales.float()

    def ends(self, columns: int) -> tuple[Tensor, Tensor]:
        """The first and the last code, float32 [N, 1]."""
        zeros = self.scales.new_zeros(len(self.scales), 1, dtype=torch.float32)
        return zeros + self.low, zeros + self.high

    def with_scales(self, scales: Tensor) -> PowerGrid:
        """The same grid under other scales [N, 1]."""
        return replace(self, scales=scales)

    @classmethod
    def stacked(cls, grids: list[PowerGrid]) -> PowerGrid:
        """One grid of the outputs of several, which have one exponent."""
        return replace(grids[0], scales=torch.cat([one.scales for one in grids]))

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32 [N, K].

        Codes may be floats between codes, too. There is a gradient in them and in the scales; that in a code,
        s^(1/a) |q|^(1/a - 1) / a, is finite everywhere, and at code 0 (nearly) zero where a < 1.
        """
        unit = (self.scales.double() ** (1 / self.exponent)).float()
        if codes.is_floating_point():
            return level(codes, self.exponent) * unit
        book = level(torch.arange(self.low, self.high + 1, device=codes.device).double(), self.exponent)
        return book[codes.long() - self.low] * unit

    def columns(self, order: Tensor) -> PowerGrid:
        """The same: all inputs of an output share its scale."""
        return self

    def nearest(self, weight: Tensor, column: int) -> Tensor:
        """The value that weight [N] is rounded to, float32."""
        return self.values(self.codes(weight[:, None]))[:, 0].to(weight.dtype)

    def rows(self, chosen: slice) -> PowerGrid:
        """The grid of some outputs."""
        return replace(self, scales=self.scales[chosen])


def grid_of(scales: Tensor, exponent: float, bits: int) -> PowerGrid:
    """The power grid of `bits` under scales [N, 1]."""
    limit = weight_limit(bits)
    return PowerGrid(scales, exponent, -limit, limit)


def raised(weight: Tensor, exponent: float) -> Tensor:
    """sign(w) |w|^exponent, float32; exponent 1 gives the weight itself."""
    return (weight.sign() * weight.double().abs() ** exponent).float()


def level(codes: Tensor, exponent: float) -> Tensor:
    """sign(q) |q|^(1 / exponent) of float codes, float32."""
    wide = codes.double()
    return (wide * wide.abs().clamp_min(NEAR_ZERO) ** (1 / exponent - 1)).float()
