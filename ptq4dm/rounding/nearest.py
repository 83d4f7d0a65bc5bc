"""Rounding to nearest: q = round(w / s) + z, halves to even."""

from __future__ import annotations

from torch import Tensor

from .registry import register_rounder


@register_rounder("nearest")
def nearest(weight: Tensor, grid, evidence=None) -> Tensor:
    """Codes [N, K] nearest to weight [N, K] float32."""
    return grid.codes(weight)
