"""Rotated Linear layers whose codes come from one kernel on a GPU: what lies before, rotation and rounding in it.

    x [..., K] -> [norm or gate ->] x H -> codes of 8 bits, a scale for each row    kernels/w4/activation_triton.py

Such codes go to the product that the format has for codes that are there already. Layers that read the same input
under the same rotation share them. Elsewhere, and for static grids, the rotation is a product of torch before the
layer's own kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...handed.rows import QuantizesRows
from ...handed.value import Handed, RowCodes, plain
from ...kernels.formats.int4 import GROUP
from ...kernels.runtime.prepared import prepared
from ...kernels.w4 import from_codes
from ...kernels.w4 import layer as w4
from .. import int4_ops
from .layer import RotatedLayer

HALVES = (torch.float16, torch.bfloat16)


class RotatedTokens(RotatedLayer):
    """A rotated Linear; the format beside it has `mode`, `encode` and `of_codes`, its product of RowCodes."""

    mode: str
    in_features: int
    qweight: Tensor

    @property
    def rotates_in_codes(self) -> bool:  # type: ignore[override]
        """Whether one kernel rotates and quantizes: codes of 8 bits, whole runs of 64 inputs, on a GPU it knows."""
        plan, device = self.plan, self.qweight.device
        if plan.static or plan.activation_bits != 8 or self.in_features % GROUP or device.type != "cuda":
            return False
        wanted = w4.FP8 if self.mode == "fp8" else w4.INT8
        return w4.kernel_name(device, self.mode, GROUP) == wanted

    @property
    def takes_norms(self) -> bool:  # type: ignore[override]
        return self.rotates_in_codes

    def codes_key(self) -> Any:
        """The rotation and the type of the codes: layers of one key that read one input share its codes."""
        return (f"rotated {self.mode}", *self.rotation) if self.rotates_in_codes else None

    def forward(self, input: Tensor | Handed) -> Tensor:
        if not self.rotates_in_codes or (input.dtype not in HALVES):
            return super().forward(input)
        given = input.codes_for(self) if isinstance(input, Handed) else None
        if given is None:
            x = plain(input)
            given = self.encode(x, None, x.dtype)
        return self.of_codes(given)  # type: ignore[attr-defined]


class GroupedTokens(RotatedTokens):
    """RotatedTokens of "int4" with symmetric groups, whose product of codes is SVDQuant's without a branch."""

    mode = "int8"
    wscales: Tensor

    encode = QuantizesRows.encode

    @property
    def rotates_in_codes(self) -> bool:  # type: ignore[override]
        return super().rotates_in_codes and self.kernel_name() == w4.INT8

    def of_codes(self, given: RowCodes) -> Tensor:
        wscales = self.wscales
        spread = prepared(wscales, GROUP, lambda: int4_ops.per_packed(wscales, self.in_features))
        branch = given.codes.new_empty(len(given.codes), 0, dtype=given.dtype)
        weight = (self.qweight, spread, None, self.added, self.mode, "", given.dtype)
        y = from_codes.svdq_product(given.codes, given.scale, branch, *weight)
        return y.reshape(*given.shape[:-1], y.shape[1])
