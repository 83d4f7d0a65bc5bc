"""The kernels that make 8-bit codes of activations, in Triton.

    int8    q = clamp(round(x / s) + z, -2^(b-1), 2^(b-1) - 1),  NaN -> z
    e4m3    q = e4m3(clamp(x / s, -448, 448)),                   NaN -> NaN
    parts   q = clamp(round(x f / s) + z + o, ...),  f and o of the channel: int8 of an input in parts (parts.py)

They write what the convolution reads: the flat padded layout of `window`, [rows, C'], padding filled with codes of
zero (so that a window never leaves an image) and channels up to a multiple of 32 (so that no load needs a mask). A
nearest-neighbour upsampling before the convolution happens here too: codes of a copy are copies of codes.

Bytes: x read once, codes written once. Dynamic scales s = max|x| / limit read x once more, before; not those of
rows of tokens, which one program holds while it looks for the largest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import fp8
from ..formats.int8 import weight_limit
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.rounding import ROUND
from ..runtime.settings import remembered
from .window import Window, stored_channels

ROW_BYTES = 2**16  # of a row of the input that one program holds


@triton.jit
def encode(v, zero, LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr):
    """v = x / s in float32 -> codes."""
    if FP8:
        v = tl.minimum(v, 448.0, propagate_nan=tl.PropagateNan.ALL)
        code = tl.maximum(v, -448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    else:
        v = tl.where(v == v, v, 0.0)
        v = tl.minimum(tl.maximum(v, -1024.0), 1024.0)  # beyond any code; keeps the rounding trick in range
        code = tl.minimum(tl.maximum((v + ROUND) - ROUND + zero, LOW), HIGH).to(tl.int8)
    return code


@triton.jit(do_not_specialize=["rows", "batch", "HP", "WP"])
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, factor_ptr, offset_ptr, rows, batch, HP, WP, sb, sh, sw, sc,
    C, CP: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, UP: tl.constexpr,
    PER_IMAGE: tl.constexpr, HAS_ZERO: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    FP8: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One block of rows of the flat layout and of channels. (C is no constant: where it leaves most of a block out,
    ptxas 12.8 falls over its own e4m3 of constant zeros.)"""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image, y, x = r // (HP * WP), r // WP % HP - PH, r % WP - PW
    inside = (image < batch) & (y >= 0) & (x >= 0)
    pixel = image.to(tl.int64) * sb + (y // UP).to(tl.int64) * sh + (x // UP) * sw
    mask = inside[:, None] & (c < C)[None, :]
    value = tl.load(x_ptr + pixel[:, None] + c[None, :].to(tl.int64) * sc, mask=mask, other=0.0).to(tl.float32)
    if PER_IMAGE:
        inverse = tl.div_rn(1.0, tl.load(scale_ptr + image, mask=inside, other=1.0))[:, None]
    else:
        inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    zero = tl.load(zero_ptr).to(tl.float32) if HAS_ZERO else 0.0
    if PARTS:
        value *= tl.load(factor_ptr + c, mask=c < C, other=1.0)[None, :]
        zero += tl.load(offset_ptr + c, mask=c < C, other=0.0)[None, :]
    code = encode(value * inverse, zero, LOW, HIGH, FP8)
    tl.store(q_ptr + r.to(tl.int64)[:, None] * CP + c[None, :], code, mask=(r < rows)[:, None] & (c < CP)[None, :])


@triton.jit
def _scale(largest, limit, TINY: tl.constexpr):
    """The scale of a largest |x|, given as bits; 1 where all is zero."""
    y = tl.div_rn(largest.to(tl.float32, bitcast=True), limit)
    return tl.where(y < TINY, 1.0, y)


@triton.jit(do_not_specialize=["rows"])
def _largest_kernel(
    x_ptr, y_ptr, rows, length, chunk, limit, TINY: tl.constexpr, SCALE: tl.constexpr,
    BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """y[r, j] = max |x[r, j * chunk : (j + 1) * chunk]|, or the scale of that. NaN counts as the largest of all.

    chunk is a multiple of BL, or the whole length.
    """
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    start = tl.program_id(1) * chunk
    largest = tl.zeros((BR, BL), dtype=tl.int32)
    for i in range(start, tl.minimum(start + chunk, length), BL):
        k = i + tl.arange(0, BL)
        mask = (r < rows)[:, None] & (k < length)[None, :]
        x = tl.load(x_ptr + r[:, None] * length + k[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))  # ordered as the floats, NaN on top
    y = tl.max(largest, axis=1)
    y = _scale(y, limit, TINY) if SCALE else y.to(tl.float32, bitcast=True)
    tl.store(y_ptr + r * tl.num_programs(1) + tl.program_id(1), y, mask=r < rows)


def scales(x: Tensor, limit: float) -> Tensor:
    """x [R, ...], each x[r] dense in memory -> s_r = max|x[r]| / limit, [R] float32; 1 where all is zero."""
    rows, length = len(x), x.numel() // len(x)
    if length > 16384:  # in two steps, so that few large samples still fill the device
        parts = x.new_empty(rows, cdiv(length, 16384), dtype=torch.float32)
        _largest(rows, length, 16384, limit, False)(x, parts)
        x, length = parts, parts.shape[1]
    y = x.new_empty(rows, dtype=torch.float32)
    _largest(rows, length, length, limit, True)(x, y)
    return y


@remembered
def _largest(rows: int, length: int, chunk: int, limit: float, scale: bool) -> Launch:
    bl = min(2048, max(16, next_power_of_2(chunk)))
    br = max(1, min(4096 // bl, next_power_of_2(rows)))
    return Launch(
        _largest_kernel, (cdiv(rows, br), cdiv(length, chunk)), rows=rows, length=length, chunk=chunk,
        limit=float(limit), TINY=torch.finfo(torch.float32).tiny, SCALE=scale, BR=br, BL=bl,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    x_ptr, q_ptr, scale_ptr, rows, stride, K, CP, limit, TINY: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    FP8: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Scales and codes of ROWS whole rows, which lie in registers; STEPS * STEP columns hold CP."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.max_contiguous(tl.arange(0, STEP), 8)[None, :]
    values = ()
    for i in tl.static_range(STEPS):
        k = i * STEP + columns
        values = values + (tl.load(x_ptr + r * stride + k, mask=(r < rows) & (k < K), other=0.0),)
    largest = tl.zeros((ROWS, STEP), dtype=tl.int32)
    for i in tl.static_range(STEPS):
        largest = tl.maximum(largest, tl.abs(values[i].to(tl.float32)).to(tl.int32, bitcast=True))  # NaN on top
    scale = _scale(tl.max(largest, axis=1)[:, None], limit, TINY)
    tl.store(scale_ptr + r, scale, mask=r < rows)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(STEPS):
        k = i * STEP + columns
        code = encode(values[i].to(tl.float32) * inverse, 0.0, LOW, HIGH, FP8)
        tl.store(q_ptr + r * CP + k, code, mask=(r < rows) & (k < CP))


def quantize_rows(x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes [M, C'] of the dtype, C' = K up to a multiple of 32, and float32 scales [M] = max|x| / limit.

    The codes and scales of `scales` and `quantize`, of one launch where a program has room for a row.
    """
    m, k = x.shape
    limit = weight_limit(bits) if dtype == torch.int8 else fp8.LIMIT
    if k * x.element_size() > ROW_BYTES:
        scale = scales(x.contiguous(), limit)
        return quantize(x[:, :, None, None], scale, None, bits, dtype), scale
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, scale = x.new_empty(m, stored_channels(k), dtype=dtype), x.new_empty(m, dtype=torch.float32)
    _rows(m, k, x.stride(0), x.element_size(), bits, dtype, limit)(x, codes, scale)
    return codes, scale


@remembered
def _rows(m: int, k: int, stride: int, size: int, bits: int, dtype: torch.dtype, limit: float) -> Launch:
    wide = stored_channels(k)
    step = 1024 if k > 2048 else min(256, next_power_of_2(wide))
    rows = 1 if k > 4096 else 2 if k > 2048 else max(4, 1024 // step)
    warps = 8 if k * size > ROW_BYTES // 2 else 4
    half = 2 ** (bits - 1)
    return Launch(
        _rows_kernel, (cdiv(m, rows),), rows=m, stride=stride, K=k, CP=wide, limit=float(limit),
        TINY=torch.finfo(torch.float32).tiny, LOW=-half, HIGH=half - 1, FP8=dtype != torch.int8, ROWS=rows,
        STEP=step * warps // 4, STEPS=cdiv(wide, step * warps // 4), num_warps=warps,
    )  # fmt: skip


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    padding=(0, 0),
    upsample: int = 1,
    factors: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """x [B, C, H, W] of any strides -> codes [rows, C'] in the flat layout of the padded (and upsampled) images.

    scale: one float32, or one per image. dtype: of the codes, int8 or float8_e4m3fn. factors, offsets: float32 [C] of
    an input in parts.
    """
    launch, size = _plan(
        x.shape, x.stride(), padding, upsample, scale.numel() > 1, zero_point is not None, factors is not None, bits,
        dtype,
    )  # fmt: skip
    codes = x.new_empty(*size, dtype=dtype)
    launch(x, codes, scale, zero_point, factors, offsets)
    return codes


@remembered
def _plan(
    shape: torch.Size, strides: tuple[int, ...], padding: tuple[int, int], upsample: int, per_image: bool,
    has_zero: bool, parts: bool, bits: int, dtype: torch.dtype,
) -> tuple[Launch, tuple[int, int]]:  # fmt: skip
    """(launch, size of the codes)."""
    (batch, channels, h, w), (sb, sc, sh, sw) = shape, strides
    window = Window(batch, h * upsample, w * upsample, padding=padding)
    wide = stored_channels(channels)
    limit = 2 ** (bits - 1)
    bc = min(128, next_power_of_2(wide))
    br = min(8192 // bc, next_power_of_2(window.rows))
    hp, wp = window.padded
    launch = Launch(
        _quantize_kernel, (cdiv(window.rows, br), cdiv(wide, bc)),
        rows=window.rows, batch=batch, HP=hp, WP=wp, sb=sb, sh=sh, sw=sw, sc=sc, C=channels, CP=wide,
        PH=padding[0], PW=padding[1], UP=upsample, PER_IMAGE=per_image, HAS_ZERO=has_zero, PARTS=parts,
        LOW=-limit, HIGH=limit - 1, FP8=dtype != torch.int8, BR=br, BC=bc, num_warps=4,
    )  # fmt: skip
    return launch, (window.rows, wide)
