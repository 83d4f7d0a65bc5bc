"""Layers with weights of 16 fitted levels, stored in 4 bits: format "codebook".

They are those of "int4" but for the levels (kernels/formats/codebook.py), int8, which stand in the place of the
multiples of one step: the same bytes but for 16 of the whole weight, or of each output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..evidence import LayerEvidence
from ..kernels.formats.codebook import LEVELS, LIMIT, CodebookGrid
from ..ranges.codebook import codebook_grid
from . import int4_ops
from .base import frozen
from .choices import BITS, FLOAT_INPUTS, GroupedPlan
from .int4 import Int4Conv2d, Int4Layer, Int4Linear
from .registry import register_format
from .stored import check_integers
from .w8a8 import check_input_grid, put_input_grid

TABLES = ("tensor", "row")


@dataclass
class CodebookPlan(GroupedPlan):
    """How one layer gets weights of 16 levels, under inputs of 8 bits; or of 16, which are floats as they come.

    weight_bits: 4.
    levels: of the whole "tensor", or of each "row", which is an output.
    objective: levels and scales are those of least squared error whatever it is. Where it looks at what the layer is
        fed, or the rounding does, the error of each weight counts by the mean square of its input.
    """

    input_widths: ClassVar[Sequence[int]] = (*BITS, FLOAT_INPUTS)
    format: str = "codebook"
    levels: str = "tensor"
    affine: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.weight_bits != 4:
            raise ValueError(f"codebook has weights of 4 bits, not {self.weight_bits}")
        if self.levels not in TABLES:
            raise ValueError(f"levels are of the {' or of each '.join(TABLES)}, not {self.levels!r}")

    @property
    def groups_text(self) -> str:
        return f"{super().groups_text} codebook" + (" by row" if self.levels == "row" else "")


class CodebookLayer(Int4Layer):
    """What Linear and Conv2d with a codebook share: the tensors of Int4Layer without zero points, and

    levels      [1, 16] int8, or [N, 16] by row and of convolutions in groups; rising
    """

    plan: CodebookPlan  # type: ignore[assignment]  # has what Int4Layer asks of one
    levels: Tensor

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        super()._allocate(shape, device)
        rows = self.plan.levels == "row" or getattr(self, "groups", 1) > 1
        self.levels = frozen(shape[0] if rows else 1, LEVELS, dtype=torch.int8, device=device)

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> CodebookGrid:
        """The grid of a float32 weight [N, K], by the plan, with scales as they are stored."""
        grid = codebook_grid(matrix, self.plan.group_size, self.plan.levels == "row", evidence)
        grid.scales = self.stored_scales(grid.scales)
        return grid

    def fill(self, codes: Tensor, grid: CodebookGrid) -> None:
        levels = grid.levels.expand_as(self.levels).contiguous()
        scales = self.stored_scales(grid.scales)
        self.put(qweight=int4_ops.packed_rows(codes), wscales=scales, levels=levels)
        put_input_grid(self, self.plan, codes.device)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_input_grid(self.plan, tensors)
        check_integers(tensors["levels"], "levels", -LIMIT, LIMIT)
        if (tensors["levels"].diff(dim=1) < 0).any():
            raise ValueError("'levels' holds levels that do not rise")


class CodebookLinear(CodebookLayer, Int4Linear):
    """y = x W^T + b, W of 16 levels and x of 8 bits: x [..., K] float -> [..., N] in x's dtype."""


class CodebookConv2d(CodebookLayer, Int4Conv2d):
    """Zero-padded convolution with weights of 16 levels: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""


register_format(
    "codebook",
    plan=CodebookPlan,
    layers={nn.Linear: CodebookLinear, nn.Conv2d: CodebookConv2d},
    grid="codebook",
)
