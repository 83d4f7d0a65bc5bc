"""Layers with weights stored in 4 bits, and 8-bit activations: format "int4"."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..evidence import LayerEvidence
from ..kernels.formats.grid import Grid
from ..kernels.formats.int4 import unpack_int4
from ..kernels.w4.layer import SHORT
from ..ranges.weights import weight_grid
from . import int4_ops
from .base import QuantizedConv2d, QuantizedLinear, frozen
from .int4_ops import PACKED
from .plan import FLOAT_INPUTS, Int4Plan
from .registry import register_format
from .rounded import RoundedLayer
from .stored import check_integers
from .w8a8 import allocate_input_grid, check_input_grid, put_input_grid

HALF = torch.finfo(torch.float16)


class Int4Layer(RoundedLayer):
    """What Linear and Conv2d with 4-bit weights share; N outputs of K inputs, in G groups (G = 1: one scale a row).

    bias              [N] in the model's dtype, or None
    qweight           [N, K'/2] uint8, K' = K up to a multiple of 64; of a convolution K counts kernel, then channel
    wscales           [N, G] float32 where G = 1, else float16, or bfloat16 where scales are too small for it
    wzeros            [N, G] int8, affine layers only
    levels            None; of a codebook, levels in the place of a uniform grid (codebook.py)
    input_scale       [] float32    static layers only
    input_zero_point  [] int32      static layers only
    """

    plan: Int4Plan
    kept = ("wscales", "input_scale")
    scales = ("wscales", "input_scale")
    wscales: Tensor
    wzeros: Tensor | None
    levels: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        outputs, inputs = shape[0], math.prod(shape[1:])
        scales = 1 if self.plan.group_size is None else inputs // self.plan.group_size
        packed = -(-inputs // PACKED) * PACKED
        self.qweight = frozen(outputs, packed // 2, dtype=torch.uint8, device=device)
        kind = torch.float32 if self.plan.group_size is None else torch.float16
        self.wscales = frozen(outputs, scales, dtype=kind, device=device)
        self.wzeros = frozen(outputs, scales, dtype=torch.int8, device=device) if self.plan.affine else None
        self.levels = None
        allocate_input_grid(self, self.plan, True, device)

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> Grid:
        """The grid of a float32 weight [N, K], by the plan, with scales as they are stored."""
        plan = self.plan
        grid = weight_grid(
            matrix, plan.weight_bits, plan.objective, plan.objective_parameter, plan.group_size, plan.affine, evidence
        )
        return grid.with_scales(self.stored_scales(grid.scales))

    def stored_scales(self, scales: Tensor) -> Tensor:
        return scales if self.plan.group_size is None else sixteen_bits(scales)

    def fill(self, codes: Tensor, grid: Grid) -> None:
        self.put(qweight=int4_ops.packed_rows(codes), wscales=grid.scales)
        if grid.zeros is not None:
            self.put(wzeros=grid.zeros.to(torch.int8))
        put_input_grid(self, self.plan, codes.device)

    def matrix(self, weight: Tensor) -> Tensor:
        return pixel_first(weight)

    def shaped(self, matrix: Tensor) -> Tensor:
        return channel_first(matrix, self.weight_shape)

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        grouped = name == "wscales" and self.plan.group_size is not None
        return (torch.float16, torch.bfloat16) if grouped else super().stored_dtypes(name)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_input_grid(self.plan, tensors)
        if self.plan.affine:
            check_integers(tensors["wzeros"], "wzeros", -8, 7)

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        if self.plan.weight_bits < 4:
            half = 2 ** (self.plan.weight_bits - 1)
            codes = unpack_int4(tensors["qweight"], PACKED)
            check_integers(codes, "qweight", -half if self.plan.affine else 1 - half, half - 1)

    def codes(self) -> Tensor:
        """The codes [N, ...], int8, unpacked in each call."""
        codes = int4_ops.unpacked_rows(self.qweight, math.prod(self.weight_shape[1:]))
        return channel_first(codes, self.weight_shape)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        inputs = math.prod(self.weight_shape[1:])
        return self.shaped(int4_ops.weight_of(self.qweight, self.wscales, self.wzeros, inputs, self.levels))

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now; of many rows where few have their own."""
        return self._kernel(few=False)

    def kernels(self) -> dict[str, str]:
        """The kernels that serve this layer, by the rows of its input."""
        floats = self.plan.activation_bits == FLOAT_INPUTS and self.model_dtype in int4_ops.HALVES
        few, many = self._kernel(floats), self._kernel(False)
        return {"all rows": many} if few == many else {f"rows <= {SHORT}": few, "more": many}

    def _kernel(self, few: bool) -> str:
        plan, shape = self.plan, self.weight_shape
        return int4_ops.kernel_name(
            self.qweight.device, len(shape) == 2, math.prod(shape[1:]), self.wscales.shape[1], plan.affine,
            plan.static, plan.activation_bits, getattr(self, "groups", 1), False, few, self.levels is not None,
        )  # fmt: skip

    @property
    def operands(self) -> tuple:
        """The arguments of the int4 ops after x: weight, its grid, bias, the input's grid and its bits."""
        return (
            self.qweight, self.wscales, self.wzeros, self.added, self.input_scale, self.input_zero_point,
            self.plan.activation_bits,
        )  # fmt: skip


class Int4Linear(Int4Layer, QuantizedLinear):
    """y = x W^T + b, W of 4 bits and x of 8: x [..., K] float -> [..., N] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return int4_ops.int4_linear(input, *self.operands, self.levels)


class Int4Conv2d(Int4Layer, QuantizedConv2d):
    """Zero-padded convolution with weights of 4 bits: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return int4_ops.int4_conv2d(input, *self.operands, *self.geometry, self.levels)


def pixel_first(weight: Tensor) -> Tensor:
    """[N, K] or [N, C, kh, kw] -> [N, K] with K in the order (kh, kw, C)."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def channel_first(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pixel_first`, for rows [n, K] of a weight of this shape."""
    if len(shape) == 2:
        return matrix
    _, channels, *kernel = shape
    return matrix.view(len(matrix), *kernel, channels).permute(0, 3, 1, 2).contiguous()


def sixteen_bits(scales: Tensor) -> Tensor:
    """Scales in float16, or in bfloat16 where they are too small or too large for it."""
    fits = scales.min() >= HALF.tiny and scales.max() <= HALF.max
    return scales.to(torch.float16 if fits else torch.bfloat16)


register_format("int4", plan=Int4Plan, layers={nn.Linear: Int4Linear, nn.Conv2d: Int4Conv2d})
