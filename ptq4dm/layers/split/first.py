"""Linear layers of texts whose first token is unlike the others: format "int8-first", a grid of its own for it.

    x_t ~ s_t (q - z),    s_0 = s / f for the first token of each text,    s_t = s for all others

The first token of CLIP and of other text encoders, which no word of a prompt changes, has values far above those of
the rest: under one scale the words are left with few codes. Inputs are split between rows here, and not between
channels as in layer.py, so that no weight changes: the integer product takes one scale for each row, as it does for
dynamic inputs, and nothing is searched for in a call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.runtime.prepared import prepared
from ...kernels.w8a8.layer import w8a8_linear
from ..base import frozen
from ..plan import LayerPlan
from ..registry import register_format
from ..w8a8 import Int8Linear
from .choices import MOST


@dataclass
class FirstTokenPlan(LayerPlan):
    """LayerPlan of a Linear whose first token has a scale of its own.

    first_factor: the scale of the other tokens over that of the first. Both have one zero point.
    """

    format: str = "int8-first"
    first_factor: float = 1.0

    def check(self) -> None:
        super().check()
        if not (math.isfinite(self.first_factor) and 1 / MOST <= self.first_factor <= MOST):
            raise ValueError(f"first_factor is {self.first_factor}, out of [2^-20, 2^20]")
        if not self.static:
            raise ValueError("the first token has a static grid, and input_scale is none")

    @property
    def input_parts(self) -> int:
        """How many parts the input has, each with its grid: the first token, and the others."""
        return 2

    @property
    def groups_text(self) -> str:
        return " first token apart"

    def token_factors(self, x: Tensor) -> Tensor:
        """The scale of most tokens over that of each token of x [..., T, K], float32 [T, 1]; 1 for x [K]."""
        factors = torch.ones(x.shape[-2] if x.ndim > 1 else 1, 1, device=x.device)
        if x.ndim > 1:
            factors[0] = self.first_factor
        return factors


class FirstTokenLinear(Int8Linear):
    """y = x W^T + b on 8-bit codes: x [..., T, K] float of T tokens a text -> [..., T, N] in x's dtype.

    first_factor  [] float32

    One row alone, [K], has no first token.
    """

    plan: FirstTokenPlan
    kept: tuple[str, ...] = (*Int8Linear.kept, "first_factor")
    scales: tuple[str, ...] = (*Int8Linear.scales, "first_factor")
    first_factor: Tensor

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        super()._allocate(shape, device)
        self.first_factor = frozen(dtype=torch.float32, device=device)

    def fill(self, codes: Tensor, grid: Any) -> None:
        super().fill(codes, grid)
        factor = torch.tensor(self.plan.first_factor, dtype=torch.float32, device=codes.device)
        self.put(first_factor=factor)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        super().check_values(tensors)
        planned, found = torch.tensor(self.plan.first_factor, dtype=torch.float32), tensors["first_factor"]
        if not torch.equal(found, planned):
            raise ValueError(f"'first_factor' is {found.item():g} and in the plan {planned.item():g}")

    def why_not_fused(self) -> str:
        return "has a first token with a grid of its own, which fused kernels do not make"

    def row_scales(self, shape: torch.Size) -> Tensor:
        """The scale of each row of an input of this shape, float32 [rows]; kept where the layer is not compiled."""
        scale = cast(Tensor, self.input_scale)

        def make() -> Tensor:
            scales = scale.repeat(shape[:-1])
            scales[..., 0] /= self.first_factor
            return scales.flatten()

        if torch.compiler.is_compiling():
            return make()
        return prepared(scale, ("rows", shape[:-1]), make, self.first_factor)

    def forward(self, input: Tensor) -> Tensor:
        qweight, weight_scale, bias, scale, zero, bits = self.operands
        if input.ndim > 1:
            scale = self.row_scales(input.shape)
        return w8a8_linear(input, qweight, weight_scale, bias, scale, zero, bits)


register_format("int8-first", plan=FirstTokenPlan, layers={nn.Linear: FirstTokenLinear})
