"""The codebook of a 4-bit weight: 16 levels instead of multiples of one step.

    w[n, k] ~ s[n, g] t[q[n, k]]        codes q in [-8, 7], levels t int8 in [-127, 127], rising: t[-8] <= ... <= t[7]

The levels are one table of the whole weight, or one of each output; the scales s are one of each group of inputs, or
of each output. A level is an int8 without any rounding, so that a product of 8-bit codes takes it as it is. Levels
and scales are fitted by ptq4dm/ranges/codebook.py.

16 levels of least squared error are Lloyd-Max quantization: Lloyd, "Least squares quantization in PCM", IEEE
Transactions on Information Theory 28 (1982); Max, "Quantizing for minimum distortion", IRE Transactions on
Information Theory 6 (1960).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

LEVELS = 16
LIMIT = 127
"""The largest magnitude of a level."""
FIRST = -8
"""The code of the lowest level."""


@dataclass
class CodebookGrid:
    """scales: [N, G] float, above zero. levels: [1, 16] or [N, 16] int8, rising."""

    scales: Tensor
    levels: Tensor
    kind: ClassVar[str] = "codebook"
    low: ClassVar[int] = FIRST
    high: ClassVar[int] = FIRST + LEVELS - 1

    def codes(self, weight: Tensor) -> Tensor:
        """Codes int8 [N, K] of the levels nearest to weight [N, K] float; halves go down."""
        units = weight.float() / self._wide(weight.shape[1])
        return nearest_codes(units, self.levels)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32 [N, K]."""
        return operand(codes, self.levels).float() * self._wide(codes.shape[1])

    def columns(self, order: Tensor) -> CodebookGrid:
        """The grid of the inputs `order` [K], with a scale for each: G = K."""
        return replace(self, scales=self._wide(len(order))[:, order])

    def nearest(self, weight: Tensor, column: int) -> Tensor:
        """The value of the grid nearest to weight [N], float32, for one input of a grid with G = K."""
        one = replace(self, scales=self.scales[:, column : column + 1])
        return one.values(one.codes(weight[:, None]))[:, 0]

    @classmethod
    def stacked(cls, grids: list[CodebookGrid]) -> CodebookGrid:
        """One grid of the outputs of several, with levels of each output."""
        levels = [grid.levels.expand(len(grid.scales), -1) for grid in grids]
        return cls(torch.cat([grid.scales for grid in grids]), torch.cat(levels))

    def rows(self, chosen: slice) -> CodebookGrid:
        """The grid of some outputs."""
        return CodebookGrid(self.scales[chosen], self.levels if len(self.levels) == 1 else self.levels[chosen])

    def _wide(self, columns: int) -> Tensor:
        """Scales [N, G] -> [N, K] float32."""
        return self.scales.float().repeat_interleave(columns // self.scales.shape[1], dim=1)


def nearest_codes(units: Tensor, levels: Tensor) -> Tensor:
    """Codes int8 [N, K] of units [N, K] float32, weights in units of their scales; levels [1, 16] or [N, 16]."""
    levels = levels.float()
    between = (levels[:, :-1] + levels[:, 1:]) / 2
    if len(levels) == 1:
        place = torch.bucketize(units, between[0])
    else:
        place = torch.searchsorted(between.contiguous(), units.contiguous())
    return (place + FIRST).to(torch.int8)


def operand(codes: Tensor, levels: Tensor) -> Tensor:
    """t[q], [N, K] in the type of the levels [1, 16] or [N, 16], of codes int8 [N, K]."""
    place = codes.long() - FIRST
    return levels[0][place] if len(levels) == 1 else levels.gather(1, place)
