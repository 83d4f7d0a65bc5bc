"""GroupNorm with the SiLU and the quantization that follow it, in Triton, for channels_last images.

    u = (x - mean_g) / sqrt(var_g + eps) * gamma_c + beta_c,   v = u sigmoid(u),   q = codes of v

in float32 from end to end: nothing is rounded between the norm and the codes. One program does some whole groups of
one image. A static scale makes one pass of it: x read once where a program's part fits in its registers, twice (the
second time out of L2) where not, codes written once; the norm, SiLU and quantize kernels it stands for read three
times and write three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import remembered
from .quantize import encode
from .window import same_window, stored_channels

WHOLE = 32768  # values that a program of 16 warps can hold
PART = 32  # channels of a program, about: 64 bytes of each pixel


@triton.jit(do_not_specialize=["batch", "H", "W", "HP", "WP"])
def _group_norm_kernel(
    x_ptr, y_ptr, gamma_ptr, beta_ptr, scale_ptr, zero_ptr, batch, H, W, HP, WP, eps,
    C: tl.constexpr, CP: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    SILU: tl.constexpr, QUANTIZE: tl.constexpr, HAS_ZERO: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    FP8: tl.constexpr, ONCE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """GROUP: channels of a group; PART: channels of a program, whole groups; y: rows of CP channels, or as x."""
    image = tl.program_id(0)
    i = tl.arange(0, BC)
    c = tl.program_id(1) * PART + i
    channel = (i < PART) & (c < C)
    size = H * W
    x_ptrs = x_ptr + image.to(tl.int64) * size * C + c[None, :]
    p = tl.arange(0, BP)

    # Sums of differences from the first pixel lose nothing to a mean far from zero.
    first = tl.load(x_ptrs, mask=channel[None, :], other=0.0).to(tl.float32)
    if ONCE:
        kept = tl.load(x_ptrs + p[:, None] * C, mask=(p < size)[:, None] & channel[None, :], other=0.0)
        d = tl.where((p < size)[:, None], kept.to(tl.float32) - first, 0.0)
        total, squares = tl.sum(d, axis=0), tl.sum(d * d, axis=0)
    else:
        sums, sums2 = tl.zeros((BP, BC), tl.float32), tl.zeros((BP, BC), tl.float32)
        for p0 in range(0, size, BP):
            mask = (p0 + p < size)[:, None] & channel[None, :]
            d = tl.load(x_ptrs + (p0 + p)[:, None] * C, mask=mask, other=0.0).to(tl.float32) - first
            d = tl.where(mask, d, 0.0)
            sums, sums2 = sums + d, sums2 + d * d
        total, squares = tl.sum(sums, axis=0), tl.sum(sums2, axis=0)
    same = (i[:, None] // GROUP == i[None, :] // GROUP) & channel[None, :]
    mean_c = tl.reshape(first, (BC,)) + total / size
    mean = tl.sum(tl.where(same, mean_c[None, :], 0.0), axis=1) / GROUP
    spread = squares - total * total / size + size * (mean_c - mean) * (mean_c - mean)
    variance = tl.sum(tl.where(same, spread[None, :], 0.0), axis=1) / (GROUP * size)
    gain = tl.rsqrt(variance + eps) * tl.load(gamma_ptr + c, mask=channel, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=channel, other=0.0).to(tl.float32)

    zero = tl.load(zero_ptr).to(tl.float32) if HAS_ZERO else 0.0
    for p0 in range(0, size, BP):
        mask = (p0 + p < size)[:, None] & channel[None, :]
        if ONCE:
            x = kept.to(tl.float32)
        else:
            x = tl.load(x_ptrs + (p0 + p)[:, None] * C, mask=mask, other=0.0).to(tl.float32)
        v = (x - mean[None, :]) * gain[None, :] + beta[None, :]
        if SILU:
            v = v / (1.0 + tl.exp(-v))
        if QUANTIZE:
            v = encode(v * tl.div_rn(1.0, tl.load(scale_ptr)), zero, LOW, HIGH, FP8)
        row = (image * HP + (p0 + p) // W + PH) * WP + (p0 + p) % W + PW
        tl.store(y_ptr + row.to(tl.int64)[:, None] * CP + c[None, :], v.to(y_ptr.dtype.element_ty), mask=mask)

    if PH + PW > 0:  # the padding above and to the left of this image's pixels; below, too, for the last image
        own = PH * WP + H * PW
        border = own + tl.where(image == batch - 1, PH * WP + PW, 0)
        padding = tl.full((BP, BC), 0.0, tl.float32) + zero
        for j0 in range(0, border, BP):
            j = j0 + p
            left = j - PH * WP
            row = image * HP * WP + tl.where(left < 0, j, (PH + left // max(PW, 1)) * WP + left % max(PW, 1))
            row = tl.where(j < own, row, batch * HP * WP + j - own)
            where = y_ptr + row.to(tl.int64)[:, None] * CP + c[None, :]
            tl.store(where, padding.to(y_ptr.dtype.element_ty), mask=(j < border)[:, None] & channel[None, :])


def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """x [B, H, W, C] contiguous -> the same shape and dtype."""
    return _launch(x, torch.empty_like(x), gamma, beta, groups, eps, silu, None, None, 8, (0, 0))


def group_norm_quantize(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool, scale: Tensor,
    zero_point: Tensor | None, bits: int, dtype: torch.dtype, padding=(0, 0),
) -> Tensor:  # fmt: skip
    """x [B, H, W, C] contiguous -> codes [rows, C'] as `quantize.quantize` would write them."""
    batch, h, w, channels = x.shape
    wide = stored_channels(channels)
    new = x.new_empty if wide == channels else x.new_zeros  # channels that only fill up must hold numbers, not NaN
    codes = new(same_window(batch, h, w, padding=padding).rows, wide, dtype=dtype)
    return _launch(x, codes, gamma, beta, groups, eps, silu, scale, zero_point, bits, padding)


def _launch(x, y, gamma, beta, groups, eps, silu, scale, zero_point, bits, padding) -> Tensor:
    kinds = scale is not None, zero_point is not None
    launch = _plan(x.shape, y.shape[-1], y.dtype, groups, eps, silu, *kinds, bits, padding, WHOLE)
    launch(x, y, gamma, beta, scale, zero_point)
    return y


@remembered
def _plan(
    shape: torch.Size, wide: int, dtype: torch.dtype, groups: int, eps: float, silu: bool, quantized: bool,
    has_zero: bool, bits: int, padding: tuple[int, int], whole: int,
) -> Launch:  # fmt: skip
    batch, h, w, channels = shape
    group = channels // groups
    part = group * max(1, PART // group)
    bc = next_power_of_2(part)
    bp = next_power_of_2(h * w)
    once = bp * bc <= whole
    if not once:
        bp = max(1, 8192 // bc)
    warps = max(4, min(16, bp * bc // 2048))
    limit = 2 ** (bits - 1)
    return Launch(
        _group_norm_kernel, (batch, cdiv(channels, part)),
        batch=batch, H=h, W=w, HP=h + padding[0], WP=w + padding[1], eps=eps,
        C=channels, CP=wide, GROUP=group, PART=part, PH=padding[0], PW=padding[1], SILU=silu,
        QUANTIZE=quantized, HAS_ZERO=has_zero, LOW=-limit, HIGH=limit - 1,
        FP8=dtype == torch.float8_e4m3fn, ONCE=once, BP=bp, BC=bc, num_warps=warps,
    )  # fmt: skip
