"""Layers of any format whose input is in parts: mapped onto one grid before the product, the weight to match.

    y = sum_p W_p x_p + b = W' x' + b - d,     x' = f x + s o,    W' = W / f,    d = s sum_k W'_k o_k

f, o are the same in all channels of a part (choices.py). x' is rounded on the layer's own grid, so that each part is
on its own; one integer product and one scale for each output serve all parts, by the format's own kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ...evidence import LayerEvidence
from ...kernels.runtime.prepared import prepared
from ..base import frozen
from ..rounded import RoundedLayer
from .choices import pads, parts_of


class SplitLayer(RoundedLayer):
    """What split layers add to those of a format, from which they inherit next; P parts of N outputs' inputs.

    input_factors  [P] float32
    input_offsets  [P] int32
    offset_sums    [N] float32, sum_k W'_k o_k; None in convolutions that pad, whose offsets are 0
    """

    plan: Any
    input_scale: Tensor | None
    input_factors: Tensor
    input_offsets: Tensor
    offset_sums: Tensor | None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kept = (*cls.kept, "input_factors", "offset_sums")
        cls.scales = (*cls.scales, "input_factors")

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        super()._allocate(shape, device)  # type: ignore[misc]
        count = len(self.plan.seams) + 1
        self.input_factors = frozen(count, dtype=torch.float32, device=device)
        self.input_offsets = frozen(count, dtype=torch.int32, device=device)
        self.offset_sums = None if pads(self) else frozen(shape[0], dtype=torch.float32, device=device)

    def fill(self, codes: Tensor, grid: Any) -> None:
        super().fill(codes, grid)
        device = codes.device
        self.put(
            input_factors=torch.tensor(self.plan.input_factors, dtype=torch.float32, device=device),
            input_offsets=torch.tensor(self.plan.input_offsets, dtype=torch.int32, device=device),
        )
        if self.offset_sums is not None:
            offsets = self._columns(self.plan.channels(self.weight_shape[1])[1].to(device))
            self.put(offset_sums=(grid.values(codes) * offsets).sum(1))

    def matrix(self, weight: Tensor) -> Tensor:
        return super().matrix(weight / self._factors(weight))

    def columns(self, weight: Tensor) -> Tensor:
        return super().matrix(weight)

    def shaped(self, matrix: Tensor) -> Tensor:
        return super().shaped(matrix) * self._factors(matrix)

    def fed(self, evidence: LayerEvidence) -> LayerEvidence:
        """The inputs times their factors; offsets are taken off again, whatever the codes of the weight."""
        assert evidence.rows is not None
        factors = self._columns(self.plan.channels(self.weight_shape[1])[0].to(evidence.rows.device))
        peak = None if evidence.peak is None else evidence.peak * factors
        return super().fed(LayerEvidence(evidence.rows * factors, peak))

    def _factors(self, like: Tensor) -> Tensor:
        """The plan's factors on a weight [N, C, ...]."""
        factors = self.plan.channels(self.weight_shape[1])[0].to(like.device)
        return factors.view(1, -1, *[1] * (len(self.weight_shape) - 2))

    def _columns(self, channels: Tensor) -> Tensor:
        """What each channel has [C], in the order of the matrix's columns [K]."""
        shape = self.weight_shape[1:]
        return self.columns(channels.view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape).contiguous())[0]

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        super().check_values(tensors)
        for name in ("input_factors", "input_offsets"):
            planned = torch.tensor(getattr(self.plan, name), dtype=tensors[name].dtype)
            if not torch.equal(tensors[name], planned):
                raise ValueError(f"'{name}' is {tensors[name].tolist()} and in the plan {planned.tolist()}")

    def why_not_fused(self) -> str:
        return f"has an input in parts (at {', '.join(map(str, self.plan.seams))}), which fused kernels do not make"

    @property
    def added(self) -> Tensor | None:
        if self.offset_sums is None:
            return self.bias
        taken = self.offset_sums * cast(Tensor, self.input_scale)  # parts have static grids
        return -taken if self.bias is None else self.bias.float() - taken

    def of_channels(self) -> tuple[Tensor, Tensor]:
        """(factors, offsets) of the input's channels [C], float32; made once where the layer is not compiled."""
        sizes = [b - a for a, b in parts_of(self.plan.seams, self.weight_shape[1])]

        def spread(parts: Tensor) -> Tensor:
            return torch.cat([part.expand(n) for part, n in zip(parts.float(), sizes, strict=True)])

        found = []
        for parts in (self.input_factors, self.input_offsets):
            made = partial(spread, parts)
            found.append(made() if torch.compiler.is_compiling() else prepared(parts, "channels", made))
        return found[0], found[1]

    def mapped(self, x: Tensor) -> Tensor:
        """x' float32, of x [..., C] of a Linear or [B, C, H, W]."""
        shape = (-1, *[1] * (len(self.weight_shape) - 2))
        factors, offsets = (one.view(shape) for one in self.of_channels())
        if self.offset_sums is None:
            return x.float() * factors
        return torch.addcmul(offsets * cast(Tensor, self.input_scale), x.float(), factors)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.mapped(input)).to(input.dtype)  # type: ignore[misc]
