"""W8A8 Linear and Conv2d as formulas in torch: the truth that every kernel is tested against.

Codes are int8 or e4m3 by the type of `qweight`. Sums run in a float type that holds every partial sum of int8
products exactly, and in float64 for e4m3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import fp8
from ..formats.int8 import dynamic_scale, quantize_activation, weight_limit
from .window import Window


def linear(x, qweight, weight_scale, bias, input_scale, input_zero_point, bits) -> Tensor:
    """x [M, K] float -> [M, N] float32."""
    if input_scale is not None and input_scale.numel() != 1:
        input_scale = input_scale.view(-1, 1)
    codes, scale = centred_codes(x, qweight.dtype, input_scale, input_zero_point, bits, dims=(1,))
    exact = _exact_dtype(qweight)
    total = codes.to(exact) @ qweight.to(exact).T
    y = total.double() * (scale.double() * weight_scale.double())
    return (y if bias is None else y + bias.double()).float()


def conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    """x [B, C, H, W] float -> [B, N, H', W'] float32; padding with zeros after the zero point is taken off is padding
    with q_x = z."""
    codes, scale = centred_codes(x, qweight.dtype, input_scale, input_zero_point, bits, dims=(1, 2, 3))
    return _convolve(codes, scale, qweight, weight_scale, bias, stride, padding, dilation, groups)


def _convolve(codes, scale, qweight, weight_scale, bias, *geometry) -> Tensor:
    exact = _exact_dtype(qweight)
    total = F.conv2d(codes.to(exact), qweight.to(exact), None, *geometry)
    y = total.double() * (scale.double() * weight_scale.double()[:, None, None])
    return (y if bias is None else y + bias.double()[:, None, None]).float()


def encode(x, dtype, scale, zero_point, bits) -> Tensor:
    """The codes of x, of `dtype`."""
    if dtype == fp8.DTYPE:
        return fp8.quantize(x, scale)
    return quantize_activation(x, scale, torch.zeros_like(scale) if zero_point is None else zero_point, bits)


def centred_codes(x, dtype, input_scale, input_zero_point, bits, dims):
    """(q_x - z as float32, s_x), with s_x broadcastable against the output."""
    if input_scale is None:
        input_scale = fp8.scale_of(x, dims) if dtype == fp8.DTYPE else dynamic_scale(x, dims, bits)
        input_zero_point = None
    codes = encode(x, dtype, input_scale, input_zero_point, bits).float()
    return codes if input_zero_point is None else codes - input_zero_point, input_scale


def _exact_dtype(qweight: Tensor) -> torch.dtype:
    """float32 while no sum of K products of codes can pass 2^24, else float64."""
    terms = qweight[0].numel()
    exact = qweight.dtype == torch.int8 and terms * 255 * weight_limit(8) < 2**24
    return torch.float32 if exact else torch.float64


# --- the flat padded layout (window.py) ---------------------------------------------------------------------


def quantize(x, scale, zero_point, bits, dtype, padding, upsample, factors=None, offsets=None) -> Tensor:
    """x [B, C, H, W] -> codes [rows, C'] of the padded and upsampled images, C' = C up to a multiple of 32.

    factors, offsets: float32 [C] of an int8 input in parts, whose codes are those of x f, moved by o.
    """
    x = x.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    window = Window(len(x), *x.shape[2:], padding=tuple(padding))
    zero = encode(x.new_zeros(()), dtype, scale, zero_point, bits)
    codes = zero.float().expand(window.rows, -(-x.shape[1] // 32) * 32).to(dtype, copy=True)
    if factors is not None:
        x, zero_point = x.float() * factors[:, None, None], zero_point + offsets[:, None, None]
    images(codes, window, x.shape[1]).copy_(encode(x, dtype, scale, zero_point, bits))
    return codes


def images(codes: Tensor, window: Window, channels: int) -> Tensor:
    """The pixels of the flat layout, as a view [B, C, H, W]."""
    (hp, wp), (ph, pw), wide = window.padded, window.padding, codes.shape[1]
    size = (window.batch, channels, window.h, window.w)
    return codes.as_strided(size, (hp * wp * wide, 1, wp * wide, wide), (ph * wp + pw) * wide)


def conv2d_codes(codes, window, qweight, weight_scale, bias, input_scale, input_zero_point) -> Tensor:
    x = images(codes, window, qweight.shape[1]).float()
    x = x if input_zero_point is None else x - input_zero_point
    geometry = (window.stride, window.padding, window.dilation)
    return _convolve(x, input_scale, qweight, weight_scale, bias, *geometry)


def group_norm(x, gamma, beta, groups, eps, silu) -> Tensor:
    y = F.group_norm(x.float(), groups, gamma.float(), beta.float(), eps)
    return F.silu(y) if silu else y
