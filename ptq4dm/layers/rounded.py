"""Layers whose codes are their weight, rounded on a grid: from a float weight to what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..evidence import LayerEvidence
from ..rounding.registry import ROUNDERS
from .base import QuantizedLayer
from .registry import finite


class RoundedLayer(QuantizedLayer):
    """What such layers share. A format says which grid a weight gets (`grid`) and how codes are stored (`fill`).

    scales_trained: whether training may change the scales of the grid.
    """

    scales_trained: ClassVar[bool] = True

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> Any:
        """The grid of a weight [N, K] float32, by the plan, with scales as they are stored."""
        raise NotImplementedError

    def fill(self, codes: Tensor, grid: Any) -> None:
        """Set the layer's tensors from codes [N, K] on a grid, and the input grid from the plan."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight [N, ...] as the matrix [N, K] that is rounded."""
        return weight.flatten(1)

    def shaped(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix.view(self.weight_shape)

    def columns(self, weight: Tensor) -> Tensor:
        """A weight [N, ...] in the order of the matrix's columns: `matrix`, where that computes nothing."""
        return self.matrix(weight)

    def fed(self, evidence: LayerEvidence) -> LayerEvidence:
        """What the matrix is multiplied by, of what the layer is fed, in the order of the matrix's columns."""
        return evidence

    def stored_scales(self, scales: Tensor) -> Tensor:
        """Scales [N, G] in the dtype in which they are stored."""
        return scales

    @torch.no_grad()
    def pack(self, weight: Tensor, name: str, evidence: LayerEvidence | None = None) -> None:
        """Fill codes and scales from a float weight [N, ...], and the input grid from the plan.

        Raises UserError, naming the layer, if the weight holds NaN or infinity.
        """
        self.fill(*self.rounded(finite(weight, name), self.plan.rounding, evidence))

    def rounded(self, weight: Tensor, rounding: str, evidence: LayerEvidence | None = None) -> tuple[Tensor, Any]:
        """(codes [N, K], the grid of all outputs) of a weight [N, ...] float32."""
        rounder = ROUNDERS.find(rounding)
        parts = list(self.parts(weight, evidence))
        codes = torch.cat([rounder(rows, grid, fed) for rows, grid, fed in parts])
        return codes, _stacked([grid for _, grid, _ in parts])

    def parts(self, weight: Tensor, evidence: LayerEvidence | None) -> Iterator[tuple[Tensor, Any, Any]]:
        """(rows [n, K] of a weight [N, ...], their grid, what feeds them), for each group of a convolution.

        evidence: of all groups' inputs, one after the other, in the order of the flattened weight.
        """
        matrix = self.matrix(weight)
        groups = 1 if evidence is None else getattr(self, "groups", 1)
        count, width = len(matrix) // groups, matrix.shape[1]
        columns = self.columns(torch.arange(width, device=weight.device).view(1, *weight.shape[1:]))[0]
        for i in range(groups):
            rows = matrix[i * count : (i + 1) * count]
            fed = None if evidence is None else self.fed(evidence.columns(columns + i * width))
            yield rows, self.grid(rows, fed), fed


def _stacked(grids: list[Any]) -> Any:
    return grids[0] if len(grids) == 1 else type(grids[0]).stacked(grids)
