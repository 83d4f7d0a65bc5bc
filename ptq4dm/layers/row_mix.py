"""Layers whose outputs have weights of two widths, stored in 4 and in 8 bits: format "row-mix".

Narrow rows are those of "int4", wide ones symmetric in 8 bits, those of "int8" where outputs have one scale: the same
codes and scales, under the same codes of the input, so that each output is what a layer of its width gives. A wide
code is stored as two nibbles, c = 16 h + (l + 8), so that all of the weight is one matrix of 4 bits: rows of high
halves, and then all rows in the order of the outputs. An index says which are wide; its bytes are the layer's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..evidence import LayerEvidence
from ..kernels.formats.grid import Grid
from ..kernels.formats.int4 import halved, high_rows
from ..kernels.w4.row_mix import codes_of
from ..ranges.weights import weight_grid
from . import int4_ops, row_mix_ops
from .base import QuantizedConv2d, QuantizedLinear, frozen
from .choices import GroupedPlan
from .int4 import channel_first, pixel_first, sixteen_bits
from .int4_ops import PACKED
from .registry import register_format
from .rounded import RoundedLayer
from .stored import check_integers
from .w8a8 import allocate_input_grid, check_input_grid, put_input_grid

WIDE = 8


@dataclass
class RowMixPlan(GroupedPlan):
    """How one layer gets weights of 8 bits for some outputs and of 4 or less for the others, under inputs of 8.

    weight_bits: of the narrow outputs: 4; or 2 and 3, narrower grids that are stored in 4 bits.
    group_size: of rows of both widths. affine: narrow rows have zero points.
    wide: the outputs with 8 bits, rising. Neither none nor all: such layers are of one width, "int4" or "int8".
    """

    format: str = "row-mix"
    affine: bool = False
    wide: list[int] = field(default_factory=list)

    def check(self) -> None:
        super().check()
        if self.weight_bits > 4:
            raise ValueError(f"row-mix has narrow weights of 4 bits and less, not {self.weight_bits}")
        if not self.wide:
            raise ValueError("row-mix has outputs of 8 bits, and wide names none")
        if self.wide[0] < 0 or any(a >= b for a, b in zip(self.wide, self.wide[1:], strict=False)):
            raise ValueError("wide holds numbers of outputs from 0 on, rising")

    def check_layer(self, layer: nn.Module) -> None:
        outputs = layer.weight.shape[0]
        if self.wide[-1] >= outputs:
            raise ValueError(f"wide names output {self.wide[-1]}, and there are {outputs}, counted from 0")
        if len(self.wide) == outputs:
            raise ValueError("wide names all outputs; such a layer is of format 'int8'")
        if getattr(layer, "groups", 1) != 1:
            raise ValueError("grouped convolutions have outputs of one width")
        super().check_layer(layer)

    @property
    def groups_text(self) -> str:
        stored = "" if self.weight_bits == 4 else " in 4 bits"
        return f"{stored}{super().groups_text}{' affine' if self.affine else ''} + {len(self.wide)} rows W8"


class RowMixLayer(RoundedLayer):
    """What Linear and Conv2d with outputs of two widths share: n narrow and w wide ones, of K inputs in G groups.

    bias              [w + n] in the model's dtype, or None
    qweight           [16 ceil(w / 16) + n + w, K'/2] uint8, as `Int4Layer` has it: high halves, then all rows
    wscales           [n + w, G], as `Int4Layer` has them
    wzeros            [n, G] int8, of the narrow rows; affine layers only
    wide              [w] int32: the wide outputs, rising
    input_scale       [] float32    static layers only
    input_zero_point  [] int32      static layers only
    """

    plan: RowMixPlan
    kept = ("wscales", "input_scale")
    scales = ("wscales", "input_scale")
    wscales: Tensor
    wzeros: Tensor | None
    wide: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        outputs, inputs, wide = shape[0], math.prod(shape[1:]), len(self.plan.wide)
        packed = -(-inputs // PACKED) * PACKED
        self.qweight = frozen(high_rows(wide) + outputs, packed // 2, dtype=torch.uint8, device=device)
        groups = inputs // (self.plan.group_size or inputs)
        kind = torch.float32 if self.plan.group_size is None else torch.float16
        self.wscales = frozen(outputs, groups, dtype=kind, device=device)
        self.wzeros = frozen(outputs - wide, groups, dtype=torch.int8, device=device) if self.plan.affine else None
        self.wide = frozen(wide, dtype=torch.int32, device=device)
        allocate_input_grid(self, self.plan, True, device)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Numbers of the narrow outputs [n] and of the wide ones [w], int64, by the plan."""
        mask = torch.zeros(self.weight_shape[0], dtype=torch.bool)
        mask[self.plan.wide] = True
        return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> Grid:
        """The grid of a float32 weight [N, K], whose outputs have ends of their own; ranges by width."""
        plan = self.plan
        groups = matrix.shape[1] // (plan.group_size or matrix.shape[1])
        scales = matrix.new_empty(len(matrix), groups)
        zeros = torch.zeros(len(matrix), groups, dtype=torch.int32, device=matrix.device) if plan.affine else None
        low, high = (torch.empty(len(matrix), 1, dtype=torch.int32, device=matrix.device) for _ in range(2))
        for rows, bits in zip(self.rows(), (plan.weight_bits, WIDE), strict=True):
            rows, affine = rows.to(matrix.device), plan.affine and bits != WIDE
            ranges = (plan.objective, plan.objective_parameter, plan.group_size, affine, evidence)
            grid = weight_grid(matrix[rows], bits, *ranges)
            scales[rows] = self.stored_scales(grid.scales).float()
            low[rows], high[rows] = grid.low, grid.high
            if zeros is not None and grid.zeros is not None:
                zeros[rows] = grid.zeros
        return Grid(scales, zeros, low, high)

    def stored_scales(self, scales: Tensor) -> Tensor:
        return scales if self.plan.group_size is None else sixteen_bits(scales)

    def fill(self, codes: Tensor, grid: Grid) -> None:
        narrow, wide = (rows.to(codes.device) for rows in self.rows())
        self.put(
            qweight=int4_ops.packed_rows(halved(codes, wide)),
            wscales=self.stored_scales(grid.scales),
            wide=wide.int(),
        )
        if grid.zeros is not None:
            self.put(wzeros=grid.zeros[narrow].to(torch.int8))
        put_input_grid(self, self.plan, codes.device)

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        grouped = name == "wscales" and self.plan.group_size is not None
        return (torch.float16, torch.bfloat16) if grouped else super().stored_dtypes(name)

    def _inputs(self) -> int:
        return math.prod(self.weight_shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        return pixel_first(weight)

    def shaped(self, matrix: Tensor) -> Tensor:
        return channel_first(matrix, self.weight_shape)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_input_grid(self.plan, tensors)
        if tensors["wide"].tolist() != self.plan.wide:
            raise ValueError("'wide' has other outputs than the plan's")
        if self.plan.affine:
            check_integers(tensors["wzeros"], "wzeros", -8, 7)

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        codes, (narrow, wide) = codes_of(tensors["qweight"], tensors["wide"], self._inputs()), self.rows()
        check_integers(codes[wide.to(codes.device)], "qweight", -127, 127)
        if self.plan.weight_bits < 4:
            half = 2 ** (self.plan.weight_bits - 1)
            lowest = -half if self.plan.affine else 1 - half
            check_integers(codes[narrow.to(codes.device)], "qweight", lowest, half - 1)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        parts = (self.qweight, self.wscales, self.wzeros, self.wide)
        return self.shaped(row_mix_ops.weight_of(*parts, self._inputs()))

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        plan, inputs, linear = self.plan, self._inputs(), len(self.weight_shape) == 2
        size = row_mix_ops.group_size(inputs, self.wscales.shape[1])
        return row_mix_ops.kernel_name(self.qweight.device, linear, inputs, size, plan.static, plan.activation_bits)

    @property
    def operands(self) -> tuple:
        """The arguments of the ops after x: rows, their grids, which are wide, bias, the input's grid."""
        return (
            self.qweight, self.wscales, self.wzeros, self.wide, self.bias, self.input_scale, self.input_zero_point,
            self.plan.activation_bits,
        )  # fmt: skip


class RowMixLinear(RowMixLayer, QuantizedLinear):
    """y = x W^T + b, W of 4 and of 8 bits and x of 8: x [..., K] float -> [..., N] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return row_mix_ops.row_mix_linear(input, *self.operands)


class RowMixConv2d(RowMixLayer, QuantizedConv2d):
    """Zero-padded convolution, weights of 4 and of 8 bits: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.weight_shape[2:]
        return row_mix_ops.row_mix_conv2d(input, *self.operands, kernel, self.stride, self.padding, self.dilation)


register_format("row-mix", plan=RowMixPlan, layers={nn.Linear: RowMixLinear, nn.Conv2d: RowMixConv2d})
