"""Linear layers of weights in blocks and inputs as they come: format "blocks" (kernels/formats/blocks.py).

They hold what files of other tools hold, to the bit: `interchange/` makes them; nothing here rounds a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...evidence import LayerEvidence
from ...kernels import dispatch
from ...kernels.blocks import layer as ops
from ...kernels.formats import blocks
from ..base import QuantizedLinear, frozen
from ..choices import check_groups
from ..plan import FLOAT_INPUTS
from ..registry import register_format
from ..stored import check_numbers

CODES = {"int4": torch.uint8, "int8": torch.int8, "e4m3": torch.float8_e4m3fn}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class BlocksPlan:
    """How one layer's weight lies in blocks.

    codes: "int4", "int8" or "e4m3". size: inputs of a block, None for a whole row. zero: z, of int4 alone.
    offsets: whether blocks have one. nested: blocks whose scales and offsets share an outer one, 0 where they are
        floats by themselves.
    """

    format: str = "blocks"
    codes: str = "int8"
    size: int | None = 32
    zero: int = 0
    offsets: bool = False
    nested: int = 0

    simulated = False
    activation_bits = FLOAT_INPUTS

    def check(self) -> None:
        """Raises ValueError where a choice is out of its range, or does not go with another."""
        if self.codes not in CODES:
            raise ValueError(f"codes are {', '.join(CODES)}, not {self.codes}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size} and counts from 1")
        if not 0 <= self.zero <= (15 if self.codes == "int4" else 0):
            raise ValueError(f"zero is {self.zero}, which is no code of {self.codes} that stands for 0")
        if self.nested < 0 or (self.nested and self.size is None):
            raise ValueError(f"nested is {self.nested} and counts blocks of a size")

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where a layer's inputs do not divide into blocks."""
        check_groups(layer, (self.size or 1) * (self.nested or 1))
        if self.codes == "int4":
            check_groups(layer, blocks.PACKED)

    def __str__(self) -> str:
        width = {"int4": "W4", "int8": "W8", "e4m3": "FP8 "}[self.codes]
        text = f"{width}A16 blocks" + ("" if self.size is None else f" g{self.size}")
        return text + (" offsets" if self.offsets else "") + (" nested" if self.nested else "")


class BlocksLinear(QuantizedLinear):
    """y = x W^T + b, W in blocks: x [..., K] float -> [..., N] in x's dtype. G blocks of a row, B runs of them.

    bias           [N] in the model's dtype, or None
    qweight        [N, K] int8 or e4m3, or [N, K / 2] uint8
    wscales        [N, G] float16, bfloat16 or float32; nested int8
    woffsets       [N, G] likewise; plans with offsets only
    outer_scales   [N, B] float16; nested plans only
    outer_offsets  [N, B] float16; nested plans with offsets only
    """

    plan: BlocksPlan
    wscales: Tensor
    woffsets: Tensor | None
    outer_scales: Tensor | None
    outer_offsets: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        plan, (outputs, inputs) = self.plan, shape
        groups = 1 if plan.size is None else inputs // plan.size
        kind = torch.int8 if plan.nested else torch.float32

        def new(*size: int, dtype: torch.dtype, there: Any = True) -> nn.Parameter | None:
            return frozen(*size, dtype=dtype, device=device) if there else None

        width = inputs // 2 if plan.codes == "int4" else inputs
        self.qweight = frozen(outputs, width, dtype=CODES[plan.codes], device=device)
        self.wscales = frozen(outputs, groups, dtype=kind, device=device)
        self.woffsets = new(outputs, groups, dtype=kind, there=plan.offsets)
        runs = groups // (plan.nested or 1)
        self.outer_scales = new(outputs, runs, dtype=torch.float16, there=plan.nested)
        self.outer_offsets = new(outputs, runs, dtype=torch.float16, there=plan.nested and plan.offsets)

    @property
    def kept(self) -> tuple[str, ...]:  # type: ignore[override]
        names = ("qweight", "wscales", "woffsets", "outer_scales", "outer_offsets")
        return tuple(name for name in names if getattr(self, name) is not None)

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        plain = name in ("wscales", "woffsets") and not self.plan.nested
        return FLOATS if plain else super().stored_dtypes(name)

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        if self.plan.codes == "e4m3":
            check_numbers(tensors["qweight"], "qweight")

    def grids(self) -> tuple[Tensor, Tensor | None]:
        """(scales, offsets or None) [N, G] float32."""
        scales = blocks.spread(self.wscales, self.outer_scales)
        return scales, None if self.woffsets is None else blocks.spread(self.woffsets, self.outer_offsets)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, K] that the codes stand for, made anew in each call."""
        return ops.weight_of(self.qweight, *self.grids(), self.plan.zero)

    def pack(self, weight: Tensor, name: str, evidence: LayerEvidence | None = None) -> None:
        raise UserError(f"layer '{name}' of the plan was read from a file: its codes cannot be made anew.")

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        return dispatch.find(dispatch.Query("blocks", "none", device=self.qweight.device)).name

    def forward(self, input: Tensor) -> Tensor:
        return ops.blocks_linear(input, self.qweight, *self.grids(), self.plan.zero, self.bias)


register_format("blocks", plan=BlocksPlan, layers={nn.Linear: BlocksLinear})
