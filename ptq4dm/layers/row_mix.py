"""Layers whose outputs have weights of two widths, stored in 4 and in 8 bits: format "row-mix".

Narrow rows are those of "int4" with one scale an output, wide ones those of "int8": the same codes and scales, under
the same codes of the input, so that each output is to the bit what a layer of its width gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..evidence import LayerEvidence
from ..kernels.formats.grid import Grid
from ..kernels.formats.int4 import unpack_int4
from ..kernels.formats.int8 import weight_limit
from ..ranges.weights import weight_grid
from . import int4_ops, row_mix_ops
from .base import QuantizedConv2d, QuantizedLinear, frozen
from .int4 import channel_first, pixel_first
from .int4_ops import PACKED
from .plan import LayerPlan
from .registry import register_format
from .rounded import RoundedLayer
from .stored import check_integers
from .w8a8 import allocate_input_grid, check_input_grid, put_input_grid


@dataclass
class RowMixPlan(LayerPlan):
    """How one layer gets weights of 8 bits for some outputs and of 4 or less for the others, under inputs of 8.

    weight_bits: of the narrow outputs: 4; or 2 and 3, narrower grids that are stored in 4 bits.
    wide: the outputs with 8 bits, rising. Neither none nor all: such layers are of one width, "int4" or "int8".
    """

    format: str = "row-mix"
    weight_bits: int = 4
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

    @property
    def simulated(self) -> bool:
        return self.activation_bits != 8

    @property
    def groups_text(self) -> str:
        stored = "" if self.weight_bits == 4 else " in 4 bits"
        return f"{stored} + {len(self.wide)} rows W8"


class RowMixLayer(RoundedLayer):
    """What Linear and Conv2d with outputs of two widths share: n narrow and w wide ones, of K inputs.

    bias              [n + w] in the model's dtype, or None
    qweight           [n, K'/2] uint8, the narrow rows as `Int4Layer` stores them
    qweight8          [w, ...] int8, the wide rows as `W8A8Layer` stores them
    wscales           [n, 1] float32, of the narrow rows
    weight_scale      [w] float32, of the wide rows
    places            [n + w] int32: which output each stored row is, narrow ones first
    input_scale       [] float32    static layers only
    input_zero_point  [] int32      static layers only
    """

    plan: RowMixPlan
    kept = ("wscales", "weight_scale", "input_scale")
    scales = ("wscales", "weight_scale", "input_scale")
    qweight8: Tensor
    wscales: Tensor
    weight_scale: Tensor
    places: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        outputs, inputs, wide = shape[0], math.prod(shape[1:]), len(self.plan.wide)
        packed = -(-inputs // PACKED) * PACKED
        self.qweight = frozen(outputs - wide, packed // 2, dtype=torch.uint8, device=device)
        self.qweight8 = frozen(wide, *shape[1:], dtype=torch.int8, device=device)
        self.wscales = frozen(outputs - wide, 1, dtype=torch.float32, device=device)
        self.weight_scale = frozen(wide, dtype=torch.float32, device=device)
        self.places = frozen(outputs, dtype=torch.int32, device=device)
        allocate_input_grid(self, self.plan, True, device)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Numbers of the narrow outputs [n] and of the wide ones [w], int64, by the plan."""
        mask = torch.zeros(self.weight_shape[0], dtype=torch.bool)
        mask[self.plan.wide] = True
        return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> Grid:
        """The grid of a float32 weight [N, K], whose outputs have ends of their own."""
        plan = self.plan
        scales = matrix.new_empty(len(matrix), 1)
        high = torch.empty(len(matrix), 1, dtype=torch.int32, device=matrix.device)
        for rows, bits in zip(self.rows(), (plan.weight_bits, 8), strict=True):
            rows = rows.to(matrix.device)
            grid = weight_grid(matrix[rows], bits, plan.objective, plan.objective_parameter, evidence=evidence)
            scales[rows], high[rows] = grid.scales, weight_limit(bits)
        return Grid(scales, None, -high, high)

    def fill(self, codes: Tensor, grid: Grid) -> None:
        narrow, wide = (rows.to(codes.device) for rows in self.rows())
        self.put(
            qweight=int4_ops.packed_rows(codes[narrow]),
            qweight8=channel_first(codes[wide], self.weight_shape),
            wscales=grid.scales[narrow],
            weight_scale=grid.scales[wide, 0],
            places=torch.cat([narrow, wide]).int(),
        )
        put_input_grid(self, self.plan, codes.device)

    def matrix(self, weight: Tensor) -> Tensor:
        return pixel_first(weight)

    def shaped(self, matrix: Tensor) -> Tensor:
        return channel_first(matrix, self.weight_shape)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_input_grid(self.plan, tensors)
        if not torch.equal(tensors["places"].cpu(), torch.cat(self.rows()).int()):
            raise ValueError("'places' has other outputs than the plan's 'wide'")

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        check_integers(tensors["qweight8"], "qweight8", -127, 127)
        if self.plan.weight_bits < 4:
            limit = weight_limit(self.plan.weight_bits)
            check_integers(unpack_int4(tensors["qweight"], PACKED), "qweight", -limit, limit)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        inputs = math.prod(self.weight_shape[1:])
        narrow = int4_ops.weight_of(self.qweight, self.wscales, None, inputs)
        wide = pixel_first(self.qweight8).float() * self.weight_scale[:, None]
        return self.shaped(row_mix_ops.placed(torch.cat([narrow, wide]), self.places))

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        return row_mix_ops.kernel_name(self.qweight.device)

    @property
    def operands(self) -> tuple:
        """The arguments of the ops after x: rows of both widths, their scales and places, bias, the input's grid."""
        return (
            self.qweight, self.qweight8, self.wscales, self.weight_scale, self.places, self.bias,
            self.input_scale, self.input_zero_point, self.plan.activation_bits,
        )  # fmt: skip


class RowMixLinear(RowMixLayer, QuantizedLinear):
    """y = x W^T + b, W of 4 and of 8 bits and x of 8: x [..., K] float -> [..., N] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return row_mix_ops.row_mix_linear(input, *self.operands)


class RowMixConv2d(RowMixLayer, QuantizedConv2d):
    """Zero-padded convolution, weights of 4 and of 8 bits: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return row_mix_ops.row_mix_conv2d(input, *self.operands, self.stride, self.padding, self.dilation)


register_format("row-mix", plan=RowMixPlan, layers={nn.Linear: RowMixLinear, nn.Conv2d: RowMixConv2d})
