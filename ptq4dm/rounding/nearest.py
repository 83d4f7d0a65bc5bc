"""Rounding to nearest: q = round(w / s) + z, halves to even."""

from __future__ import annotations

from torch import Tensor

from ..evidence import LayerEvidence
from ..kernels.formats.grid import Fp8Grid, Grid
from ..kernels.formats.power import PowerGrid
from .registry import register_rounder


@register_rounder("nearest")
def nearest(weight: Tensor, grid: Grid | Fp8Grid | PowerGrid, evidence: LayerEvidence | None = None) -> Tensor:
    """Codes [N, K] nearest to weight [N, K] float32."""
    return grid.codes(weight)
