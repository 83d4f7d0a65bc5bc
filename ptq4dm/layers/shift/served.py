"""The same three products on the grids that a quantized model is served with: quantization-aware training.

    y  = s_x s_w sum q_x q_w        s_w one scale an output, s_x one a row (a token, an image)
    dx = sum over outputs of (dy s_w) q_w           dw = sum over rows of (dy s_x) q_x

The forward pass has the codes that the layer of `quantize` will have: both scales reach to the largest value, so
that the ranges are learned with the weights. Such scales lie along what the gradients sum over, and an integer
product has no place for them there: each goes into dy before dy is rounded, stochastically and in groups as ever.
Rounding has the gradient 1 (straight through); nothing is clipped that would have another.

Of fine inputs what the codes leave is rounded again, to steps 2 limit times as narrow, and multiplied in a product of
its own: two products of 8-bit codes are one of 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.formats import shift
from ...kernels.formats.int8 import dynamic_scale, quantize_weight, weight_limit
from ...kernels.shift.products import shift_conv2d
from ...kernels.shift.transposed import shift_input_gradient
from .product import Geometry, encoded_gradient, weight_sums
from .widths import Widths


class ServedProduct(torch.autograd.Function):
    """x [R, H, W, C] float, weight [N, kh, kw, C] float, bias [N] or None -> [R, H', W', N] of dtype."""

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
        x_scale = dynamic_scale(x, (1, 2, 3), widths.input)
        limit = weight_limit(widths.input)
        steps = x.float() * (1.0 / x_scale)
        whole = torch.round(steps).clamp_(-limit, limit)
        codes = whole.to(torch.int8)
        w_scale = dynamic_scale(weight, (1, 2, 3), widths.weight).flatten()
        qweight = quantize_weight(weight, w_scale, widths.weight)
        x_scale, finer = x_scale.flatten(), None
        if widths.fine:
            finer = torch.round((steps - whole) * (2 * limit)).clamp_(-limit, limit).to(torch.int8)
        ctx.save_for_backward(codes, x_scale, qweight, w_scale, finer)
        ctx.geometry, ctx.widths = geometry, widths
        ctx.types = x.dtype, weight.dtype, None if bias is None else bias.dtype
        bias = None if bias is None else bias.float()
        if finer is None:
            return shift_conv2d(codes, qweight, x_scale, w_scale, bias, *geometry, dtype)
        y = shift_conv2d(codes, qweight, x_scale, w_scale, bias, *geometry, torch.float32)
        rest = x_scale / (2 * limit)
        return y.add_(shift_conv2d(finer, qweight, rest, w_scale, None, *geometry, torch.float32)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        codes, x_scale, qweight, w_scale, finer = ctx.saved_tensors
        dy = gradients[0]
        by_input = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            d = encoded_gradient(dy * w_scale, ctx.widths)
            by_input = shift_input_gradient(
                shift.across_columns(d).view(dy.shape), qweight, shift.row_steps(d) * shift.shift_step(d.groups),
                torch.ones_like(x_scale[:1]).expand(codes.shape[3]), codes.shape[1:3], *ctx.geometry, ctx.types[0],
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            d = encoded_gradient(dy * x_scale[:, None, None, None], ctx.widths)
            across = shift.across_rows(d).view(dy.shape)
            sums = weight_sums(across, codes, qweight.shape, ctx.geometry)
            if finer is not None:
                rest = weight_sums(across, finer, qweight.shape, ctx.geometry)
                sums = sums + rest / (2.0 * weight_limit(ctx.widths.input))
            steps = shift.column_steps(d) * shift.shift_step(d.groups)
            by_weight = (sums * steps[:, None, None, None]).to(ctx.types[1])
        if ctx.needs_input_grad[2]:
            by_bias = dy.float().sum((0, 1, 2)).to(ctx.types[2])
        return by_input, by_weight, by_bias, None, None, None
