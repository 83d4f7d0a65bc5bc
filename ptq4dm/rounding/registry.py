"""The slot of rounders: which of the codes near a weight stands for it.

A rounder is a function (weight [N, K] float32, grid, evidence) -> codes [N, K] of the grid's type. Grids are those of
kernels/formats/grid.py, power.py and codebook.py; `evidence` is a LayerEvidence, or None where the rounder needs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..registry import Registry

ROUNDERS: Registry = Registry("rounding")


def register_rounder(
    name: str,
    needs: frozenset[str] = frozenset(),
    grids: tuple[str, ...] = ("uniform", "e4m3", "power", "binary", "codebook"),
) -> Callable:
    """Return a decorator that makes a rounder known under a name.

    needs: "rows", if it looks at what the layer is fed. grids: the kinds of grids that it serves.
    """

    def add(rounder: Any) -> Any:
        rounder.needs, rounder.grids = frozenset(needs), grids
        return ROUNDERS.add(name, rounder)

    return add
