"""Grids: what a weight [N, K] can be rounded to, whatever its format.

    uniform    w ~ s (q - z),   q in [low, high];   s and z [N, G] are one for each of G groups of K / G inputs
    e4m3       w ~ s q,         q one of the floats of 8 bits

`codes` rounds to nearest, halves to even; `values` is its inverse; `columns` picks inputs, so that a rounder can go
through them in its own order; `nearest` rounds one of them. What trains codes takes `steps`, where a weight lies
between them, and `ends`, how far they reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from . import fp8
from .int4 import dequantize_groups, quantize_codes


@dataclass
class Grid:
    """scales: [N, G] float; zeros: [N, G] integers, or None.

    low, high: the first and the last code; integers, or tensors of integers [N, 1] where each output has its own.
    """

    scales: Tensor
    zeros: Tensor | None
    low: int | Tensor
    high: int | Tensor
    kind: ClassVar[str] = "uniform"

    def codes(self, weight: Tensor) -> Tensor:
        """Codes int8 [N, K] of weight [N, K] float."""
        if self.zeros is None and isinstance(self.low, int) and isinstance(self.high, int):
            return quantize_codes(weight, self.scales, self.low, self.high)
        steps = self.steps(weight).round_()
        if self.zeros is not None:
            steps += self._wide(self.zeros, weight.shape[1])
        return steps.clamp_(self.low, self.high).nan_to_num_(0.0).to(torch.int8)

    def steps(self, weight: Tensor) -> Tensor:
        """weight [N, K] in units of its scales, float32: what a rounder rounds up or down, before zero points."""
        return weight.float() / self._wide(self.scales.float(), weight.shape[1])

    def ends(self, columns: int) -> tuple[Tensor, Tensor]:
        """The first and the last code of each weight less its zero point, float32 [N, 1]; [N, K] with zero points."""
        zeros = self.scales.new_zeros(len(self.scales), 1, dtype=torch.float32)
        if self.zeros is not None:
            zeros = self._wide(self.zeros, columns).float()
        return self.low - zeros, self.high - zeros

    def with_scales(self, scales: Tensor) -> Grid:
        """The same grid under other scales [N, G]."""
        return replace(self, scales=scales)

    @classmethod
    def stacked(cls, grids: list[Grid]) -> Grid:
        """One grid of the outputs of several."""
        zeros = None if grids[0].zeros is None else torch.cat([one.zeros for one in grids])
        low, high = _joined([one.low for one in grids]), _joined([one.high for one in grids])
        return replace(grids[0], scales=torch.cat([one.scales for one in grids]), zeros=zeros, low=low, high=high)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32 [N, K]."""
        if self.zeros is None:
            return dequantize_groups(codes, self.scales)
        return (codes.float() - self._wide(self.zeros, codes.shape[1])) * self._wide(
            self.scales.float(), codes.shape[1]
        )

    def columns(self, order: Tensor) -> Grid:
        """The grid of the inputs `order` [K], with a scale for each: G = K. Those of one input lie together."""
        group = order // (len(order) // self.scales.shape[1])
        scales = self.scales.float().T[group].T
        zeros = None if self.zeros is None else self.zeros.T[group].T
        return Grid(scales, zeros, self.low, self.high)

    def nearest(self, weight: Tensor, column: int) -> Tensor:
        """The value of the grid nearest to weight [N], float32, for one input of a grid with G = K."""
        scale = self.scales[:, column]
        low, high = (end if isinstance(end, int) else end[:, 0] for end in (self.low, self.high))
        if self.zeros is None:
            return (weight / scale).round_().clamp_(low, high).mul_(scale)
        zero = self.zeros[:, column]
        return (weight / scale).round_().add_(zero).clamp_(low, high).sub_(zero).mul_(scale)

    def rows(self, chosen: slice) -> Grid:
        """The grid of some outputs."""
        low, high = (end if isinstance(end, int) else end[chosen] for end in (self.low, self.high))
        return Grid(self.scales[chosen], None if self.zeros is None else self.zeros[chosen], low, high)

    def _wide(self, values: Tensor, columns: int) -> Tensor:
        """[N, G] -> [N, K]."""
        return values.repeat_interleave(columns // values.shape[1], dim=1)


def _joined(ends: list[int | Tensor]) -> int | Tensor:
    """The first or last codes of the outputs of several grids."""
    return torch.cat(ends) if isinstance(ends[0], Tensor) else ends[0]  # type: ignore[arg-type]  # all are of a kind


@dataclass
class Fp8Grid:
    """scales: [N, 1] float32 of e4m3 codes."""

    scales: Tensor
    kind: ClassVar[str] = "e4m3"

    def codes(self, weight: Tensor) -> Tensor:
        """Codes e4m3 [N, K] of weight [N, K] float."""
        return fp8.quantize(weight, self.scales)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32 [N, K]."""
        return codes.float() * self.scales

    def columns(self, order: Tensor) -> Fp8Grid:
        """The same: all inputs of an output share its scale."""
        return self

    def nearest(self, weight: Tensor, column: int) -> Tensor:
        """The value of the grid nearest to weight [N], float32."""
        return self.values(self.codes(weight[:, None]))[:, 0]

    @classmethod
    def stacked(cls, grids: list[Fp8Grid]) -> Fp8Grid:
        """One grid of the outputs of several."""
        return cls(torch.cat([one.scales for one in grids]))

    def rows(self, chosen: slice) -> Fp8Grid:
        """The grid of some outputs."""
        return Fp8Grid(self.scales[chosen])
