"""Allocation by roles: where a layer stands in the model decides which of the candidates it gets.

    edges       the layer that reads the model's input channels, and the one that writes its output channels
    w4          matrix products over tokens inside the repeated blocks
    weight-only layers of blocks that are fed an embedding and widen it at least twice (adaLN)
    int8        the other layers of blocks, and convolutions of several pixels
    keep        everything else

The edges are PTQ4DM's rule (arXiv:2211.15736); the others are SVDQuant's (arXiv:2411.05007).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..calibration.trace import Traced
from ..errors import UserError
from ..layers.view import LayerView, matrix_like

Candidate = Callable[[LayerView], Any]
"""A view -> the plan of the layer, or None to keep it in full precision."""

KEEP = "keep"
ROLES = ("w4", "weight-only", "int8", KEEP)


def allocate(
    views: list[LayerView], candidates: Mapping[str, Candidate | None], role_of: Callable[[LayerView], str]
) -> dict[str, Any]:
    """Layer name -> plan: of each view the candidate of its role, asked in the model's order.

    A role without a candidate keeps the layer in full precision.
    """
    plans = {}
    for view in views:
        candidate = candidates.get(role_of(view))
        plan = None if candidate is None else candidate(view)
        if plan is not None:
            plans[view.name] = plan
    return plans


def edge_role(view: LayerView) -> str:
    """ "edge" for the first and the last layer of a model, else "inner"."""
    return "edge" if view.role in ("first", "last") else "inner"


@dataclass
class BlockRoles:
    """Roles of layers by how they are called.

    traced: layer name -> how it was called; group_size: inputs that share a scale in 4 bits.
    patterns: shell pattern of layer names -> role; the first that fits counts.
    """

    traced: dict[str, Traced]
    group_size: int
    patterns: dict[str, str] = field(default_factory=dict)

    def check(self, views: list[LayerView]) -> None:
        """Raises UserError for a pattern that names no layer."""
        unmatched = [p for p in self.patterns if not any(fnmatch.fnmatch(view.name, p) for view in views)]
        if unmatched:
            raise UserError(f"'{unmatched[0]}' in roles names no layer of the model; see `ptq4dm info`.")

    def __call__(self, view: LayerView) -> str:
        """The role of a layer. Raises UserError where a pattern asks for what the layer cannot be."""
        seen, inputs = self.traced.get(view.name), view.weight.shape[1]
        fits = matrix_like(view.module) and inputs % self.group_size == 0
        for pattern, role in self.patterns.items():
            if fnmatch.fnmatch(view.name, pattern):
                if role in ("w4", "weight-only") and (seen is None or not fits):
                    why = "was not called in calibration" if seen is None else "does not divide into groups"
                    raise UserError(f"layer '{view.name}' cannot be {role}: it {why}.")
                return role
        if seen is None or view.role != "inner":
            return KEEP
        if isinstance(view.module, nn.Conv2d) and not matrix_like(view.module):
            return "int8"
        if not any(part.isdigit() for part in view.name.split(".")):
            return KEEP
        if fits and seen.tokens:
            return "w4"
        widens = view.weight.shape[0] >= 2 * inputs
        return "weight-only" if fits and widens and not seen.tokens else "int8"
