"""The products of product.py as a GPU runs them: the same codes by fewer kernels, which write what products read.

Two differences: noise comes from a counter-based generator, whose seed torch's draws (kernels/shift/noise.py); and
with a stride, zeros go between the pixels of dy before it is rounded, so that every gradient is of stride 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.shift.operands import shift_flat_conv2d, shift_images, shift_over_rows, shift_weight
from ...kernels.shift.transposed import spread
from ...kernels.w8a8.window import same_window, turned_padding
from .product import Geometry
from .widths import Widths

ONE = (1, 1)


class FusedProduct(torch.autograd.Function):
    """x [B, H, W, C] float, weight [N, kh, kw, C] float, bias [N] or None -> [B, H', W', N] of dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        widths: Widths,
        dtype: torch.dtype,
    ) -> Tensor:
        kernel, bits, groups = weight.shape[1:3], widths.input, widths.groups_of(widths.input)
        flat, h, g, row_steps, column_steps, _ = shift_images(x, bits, groups, geometry[1], None)
        codes, turned, w_rows, w_columns = shift_weight(weight, widths.weight, widths.groups_of(widths.weight))
        ctx.save_for_backward(flat, h, g, column_steps, turned, w_columns)
        ctx.size, ctx.kernel, ctx.geometry, ctx.widths = x.shape[:3], kernel, geometry, widths
        ctx.types = x.dtype, weight.dtype, None if bias is None else bias.dtype
        bias = None if bias is None else bias.float()
        return shift_flat_conv2d(flat, codes, row_steps, w_rows, bias, ctx.size, kernel, *geometry, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *inputs, turned, w_columns = ctx.saved_tensors
        widths, kernel, (stride, padding, dilation) = ctx.widths, ctx.kernel, ctx.geometry
        around = turned_padding(kernel, padding, dilation)
        dy = gradients[0]
        if stride != ONE:
            dy = spread(dy, stride, same_window(*ctx.size, kernel, ONE, padding, dilation).output)
        seed = new_seed(dy.device)
        groups = widths.groups_of(widths.gradient)
        flat, h, g, row_steps, column_steps, sums = shift_images(dy, widths.gradient, groups, around, seed)
        by_input = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_input = shift_flat_conv2d(
                flat, turned, row_steps, w_columns, None, dy.shape[:3], kernel, ONE, around, dilation, ctx.types[0]
            )
        if ctx.needs_input_grad[1]:
            by_weight = shift_over_rows(
                flat, h, g, column_steps, groups, *inputs, widths.groups_of(widths.input),
                ctx.size, kernel, padding, dilation,
            )  # fmt: skip
            by_weight = by_weight.to(ctx.types[1])
        if ctx.needs_input_grad[2]:
            by_bias = (sums * column_steps).to(ctx.types[2])
        return by_input, by_weight, by_bias, None, None, None


def new_seed(device: torch.device) -> Tensor:
    """int64 [], from torch's generator of the device as dropout's noise is: another at each replay of a graph."""
    return torch.randint(2**62, (), device=device)
