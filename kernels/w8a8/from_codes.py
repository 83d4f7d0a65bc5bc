"""Ops for layers whose producer hands over codes: quantization apart from the product, or fused with what is before.

Codes are in the flat padded layout of `window`, [rows, C']. `fuse.py` puts a model's norms and convolutions together
with them; each has the formula in torch for devices without a kernel. `linear` is for torch.compile, which fuses the
formula itself with what is before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats import fp8
from ..formats.int8 import dynamic_scale
from ..formats.nonlinearities import NONLINEARITIES, check
from ..runtime.late import late
from ..runtime.ops import op
from . import layer, reference, steps
from .window import Window, same_window

if TYPE_CHECKING:
    from . import norm, quantize
else:
    late(globals(), "norm", "quantize")


@torch.compiler.assume_constant_result  # a GPU stays what it is, and the compiler does not know how to ask
def triton_serves(device: torch.device, dtype: torch.dtype = torch.int8) -> bool:
    return layer.kernel_name(device, 8, 1, dtype) in (layer.TRITON, layer.TRITON_FP8)


@op
def w8a8_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    padding: Sequence[int],
    upsample: int,
) -> Tensor:
    """x [B, C, H, W] float -> codes of the nearest-neighbour upsampled images, with room for a window's padding."""
    if triton_serves(x.device, dtype) and x.numel():
        return quantize.quantize(x, scale, zero_point, bits, dtype, tuple(padding), upsample)
    return reference.quantize(x, scale, zero_point, bits, dtype, padding, upsample)


@w8a8_quantize.register_fake
def _(x, scale, zero_point, bits, dtype, padding, upsample):
    batch, channels, h, w = x.shape
    window = Window(batch, h * upsample, w * upsample, padding=tuple(padding))
    return x.new_empty(window.rows, -(-channels // 32) * 32, dtype=dtype)


@op
def w8a8_group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    padding: Sequence[int],
) -> Tensor:
    """x [B, C, H, W] -> codes of GroupNorm(x), with SiLU after it where `silu`; nothing is rounded in between."""
    if triton_serves(x.device, dtype) and x.numel():
        pixels = x.permute(0, 2, 3, 1).contiguous()
        return norm.group_norm_quantize(
            pixels, gamma, beta, groups, eps, silu, scale, zero_point, bits, dtype, tuple(padding)
        )
    y = reference.group_norm(x, gamma, beta, groups, eps, silu)
    return reference.quantize(y, scale, zero_point, bits, dtype, padding, 1)


@w8a8_group_norm.register_fake
def _(x, gamma, beta, groups, eps, silu, scale, zero_point, bits, dtype, padding):
    batch, channels, h, w = x.shape
    return x.new_empty(Window(batch, h, w, padding=tuple(padding)).rows, -(-channels // 32) * 32, dtype=dtype)


@op
def group_norm_silu(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """x [B, C, H, W] -> GroupNorm(x), with SiLU after it where `silu`, channels_last and in x's dtype."""
    if triton_serves(x.device) and x.numel():
        return norm.group_norm(x.permute(0, 2, 3, 1).contiguous(), gamma, beta, groups, eps, silu).permute(0, 3, 1, 2)
    y = reference.group_norm(x, gamma, beta, groups, eps, silu).to(x.dtype)
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@group_norm_silu.register_fake
def _(x, gamma, beta, groups, eps, silu):
    batch, channels, h, w = x.shape
    return x.new_empty(batch, h, w, channels).permute(0, 3, 1, 2)


@op
def w8a8_tokens(x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> codes [M, C'] of the dtype int8 or e4m3, and float32 scales [M]: symmetric, by its rows.

    C' = K up to a multiple of 32, filled with codes of 0.
    """
    m, k = x.shape
    image = x.reshape(m, k, 1, 1)
    if triton_serves(x.device, dtype) and x.numel():
        return quantize.quantize_rows(x, bits, dtype)
    dims = (1, 2, 3)
    scale = fp8.scale_of(image, dims) if dtype == fp8.DTYPE else dynamic_scale(image, dims, bits)
    codes = x.new_zeros(m, -(-k // 32) * 32, dtype=dtype)
    codes[:, :k] = reference.encode(image, dtype, scale, None, bits)[:, :, 0, 0]
    return codes, scale.flatten()


@w8a8_tokens.register_fake
def _(x, bits, dtype):
    m, k = x.shape
    return x.new_empty(m, -(-k // 32) * 32, dtype=dtype), x.new_empty(m, dtype=torch.float32)


@op
def w8a8_conv2d_codes(
    codes: Tensor,
    image: Sequence[int],
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    shift: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """codes [rows, C'], qweight [N, C, kh, kw] or [N, C] -> [B, N, H', W'] channels_last; image: (B, H, W).

    scale: one, or one for each image. shift [B, N] and residual [B, N, H', W'] are added before the one rounding to
    `dtype`.
    """
    window = _window(image, qweight, stride, padding, dilation, same_window)
    if triton_serves(codes.device, qweight.dtype) and window.batch:
        added = None if residual is None else residual.permute(0, 2, 3, 1)
        parameters = steps.Parameters(qweight, weight_scale, bias, scale, zero_point)
        y = steps.multiply(codes, window, parameters, dtype, shift, added)
        return y.permute(0, 3, 1, 2)
    weight = qweight if qweight.ndim == 4 else qweight[:, :, None, None]
    scale = scale if scale.numel() == 1 else scale.view(-1, 1, 1, 1)
    y = reference.conv2d_codes(codes, window, weight, weight_scale, bias, scale, zero_point)
    y = y if shift is None else y + shift[:, :, None, None]
    y = y if residual is None else y + residual
    return y.to(dtype).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@w8a8_conv2d_codes.register_fake
def _(codes, image, qweight, weight_scale, bias, scale, zero, stride, padding, dilation, shift, residual, dtype):
    window = _window(image, qweight, stride, padding, dilation)
    return codes.new_empty(window.batch, *window.output, len(qweight), dtype=dtype).permute(0, 3, 1, 2)


@op
def w8a8_product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    nonlinearity: str,
    dtype: torch.dtype,
) -> Tensor:
    """codes [M, C'] of rows, qweight [N, K] -> [M, N] of dtype; the nonlinearity is applied to float32.

    scale: of all rows, or [M]. nonlinearity: "", "gelu", "gelu_tanh" or "silu"; ValueError for others.
    """
    check(nonlinearity)
    m = len(codes)
    window = same_window(m, 1, 1)
    if triton_serves(codes.device, qweight.dtype) and m:
        layer = steps.Parameters(qweight, weight_scale, bias, scale, zero_point)
        return steps.multiply(codes, window, layer, dtype, nonlinearity=nonlinearity).view(m, len(qweight))
    scale = scale if scale.numel() == 1 else scale.view(-1, 1, 1, 1)
    y = reference.conv2d_codes(codes, window, qweight[:, :, None, None], weight_scale, bias, scale, zero_point)
    return NONLINEARITIES[nonlinearity](y.view(m, len(qweight))).to(dtype)


@w8a8_product.register_fake
def _(codes, scale, zero_point, qweight, weight_scale, bias, nonlinearity, dtype):
    return codes.new_empty(len(codes), len(qweight), dtype=dtype)


def linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """Compute `w8a8_linear`. Under torch.compile, where `takes_codes`, codes are made by operations of torch.

    Those the compiler sees, and makes the codes in the kernel that computes x (a norm, a modulation, an activation):
    x itself is not written. The same x gives the same codes and the same y as in `w8a8_linear`; but an x inside a
    fused kernel is float32 that nobody has rounded to bf16, so that a compiled model differs from the uncompiled one
    by rounding: some codes by one step.
    """
    if not (torch.compiler.is_compiling() and takes_codes(x, qweight, input_scale)):
        return layer.w8a8_linear(x, qweight, weight_scale, bias, input_scale, input_zero_point, activation_bits)
    rows = x.reshape(-1, x.shape[-1])
    codes = static_codes(rows, qweight.dtype, input_scale, input_zero_point, activation_bits)
    operands = (qweight, weight_scale, bias, input_scale, input_zero_point)
    y = w8a8_conv2d_codes(codes, [len(rows), 1, 1], *operands, [1, 1], [0, 0], [1, 1], None, None, x.dtype)
    return y.reshape(*x.shape[:-1], len(qweight))


def static_codes(
    rows: Tensor, dtype: torch.dtype, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:  # fmt: skip
    """Return codes [M, C'] of rows [M, K] on a static grid; under torch.compile by operations that it sees."""
    if torch.compiler.is_compiling() and _codes_fit(rows, dtype):
        return reference.encode(rows, dtype, scale, zero_point, bits).contiguous()
    return w8a8_quantize(rows[:, :, None, None], scale, zero_point, bits, dtype, [0, 0], 1)


def takes_codes(x: Tensor, qweight: Tensor, input_scale: Tensor | None) -> bool:
    """Say whether a Linear's kernel multiplies codes that need no largest value first and no channels to fill up."""
    return input_scale is not None and _codes_fit(x, qweight.dtype)


def _codes_fit(x: Tensor, dtype: torch.dtype) -> bool:
    return x.shape[-1] % 32 == 0 and triton_serves(x.device, dtype)


def _window(image, qweight, stride, padding, dilation, make=Window) -> Window:
    kernel = tuple(qweight.shape[2:]) or (1, 1)
    return make(*image, kernel, tuple(stride), tuple(padding), tuple(dilation))
