"""A convolution whose three products, forward and backward, are of integers (ShiftQuant, arXiv:2411.10948).

    y  = x * w              sums over input channels    codes of x and w to the nearest
    dx = dy * w turned      sums over output channels   codes of dy by stochastic rounding: their mean is dy
    dw = dy * x             sums over samples           the same codes of dy, those of x from the forward pass

Each tensor is rounded once. Its steps go by powers of two along rows and along columns (kernels/formats/shift.py), so
that either product has them as shifts along what it sums over, and as factors of its results along the rest. Rows are
samples, or tokens of a Linear layer: the loss of a diffusion model weighs times differently, and gradients of one
batch differ by more than a scale holds. Kept for the backward pass are codes, a byte for each value, and no floats.

Our assumptions: weights are grouped, too; gradients by the weight stay float32 sums of what int32 sums are worth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.formats import shift
from ...kernels.formats.shift import ShiftCodes
from ...kernels.shift.products import rows_at_once, shift_conv2d, shift_weight_gradient
from ...kernels.shift.transposed import shift_input_gradient
from .noise import uniform
from .widths import Widths

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding, dilation


class Product(torch.autograd.Function):
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
        inputs = _encoded(x, widths.input, widths)
        weights = _encoded(weight, widths.weight, widths)
        ctx.save_for_backward(*inputs[:4], *weights[:4])
        ctx.groups, ctx.geometry, ctx.widths = (inputs.groups, weights.groups), geometry, widths
        ctx.shapes, ctx.types = (x.shape, weight.shape), (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return shift_conv2d(
            shift.across_columns(inputs).view(x.shape),
            shift.across_columns(weights).view(weight.shape),
            shift.row_steps(inputs) * shift.shift_step(inputs.groups),
            shift.row_steps(weights) * shift.shift_step(weights.groups),
            None if bias is None else bias.float(),
            *geometry,
            dtype,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved, (x_shape, w_shape) = ctx.saved_tensors, ctx.shapes
        inputs, weights = ShiftCodes(*saved[:4], ctx.groups[0]), ShiftCodes(*saved[4:], ctx.groups[1])
        dy = gradients[0]
        codes = encoded_gradient(dy, ctx.widths)
        one = shift.shift_step(codes.groups)
        by_input = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_input = shift_input_gradient(
                shift.across_columns(codes).view(dy.shape),
                shift.across_rows(weights).view(w_shape),
                shift.row_steps(codes) * one,
                shift.column_steps(weights) * shift.shift_step(weights.groups),
                x_shape[1:3],
                *ctx.geometry,
                ctx.types[0],
            )
        across = shift.across_rows(codes)
        if ctx.needs_input_grad[1]:
            sums = weight_sums(across.view(dy.shape), shift.across_rows(inputs).view(x_shape), w_shape, ctx.geometry)
            steps = shift.column_steps(inputs) * (one * shift.shift_step(inputs.groups))
            by_weight = (sums * steps * shift.column_steps(codes)[:, None, None, None]).to(ctx.types[1])
        if ctx.needs_input_grad[2]:
            total = across.sum((0, 1), dtype=torch.int32)
            by_bias = (total * shift.column_steps(codes) * one).to(ctx.types[2])
        return by_input, by_weight, by_bias, None, None, None


def _encoded(x: Tensor, bits: int, widths: Widths) -> ShiftCodes:
    return shift.encode(x.reshape(len(x), -1, x.shape[-1]), bits, widths.groups_of(bits))


def encoded_gradient(dy: Tensor, widths: Widths) -> ShiftCodes:
    """Codes of a gradient [B, H', W', N], by stochastic rounding."""
    flat = dy.reshape(len(dy), -1, dy.shape[-1])
    return shift.encode(flat, widths.gradient, widths.groups_of(widths.gradient), uniform(flat))


def weight_sums(gradient: Tensor, x: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """int32 sums; where there are more terms than these hold, float32 sums of them over parts of the batch."""
    most = rows_at_once(gradient.shape[1] * gradient.shape[2])
    parts = [
        shift_weight_gradient(gradient[i : i + most], x[i : i + most], shape[1:3], *geometry)
        for i in range(0, len(x), most)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).float().sum(0)
