"""The norm and rotary embedding of rotary.py as parts of Triton's kernels that make codes (codes8.py).

In float32, without the roundings to 16 bits that torch makes between its steps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_tile(
    x_ptr, words_ptr, words_offset, n, start, row, words_row, T, end, j, D: tl.constexpr, JOINT: tl.constexpr
):  # fmt: skip
    """Rows n of a head, those below T of the text; 0 from `end` on."""
    wide, channels = n.to(tl.int64), (j < D)[None, :]
    if JOINT == 1:
        words = words_ptr + words_offset + wide[:, None] * words_row + j[None, :]
        image = x_ptr + (wide - T)[:, None] * row + j[None, :]
        words = tl.load(words, mask=((n < T) & (n < end))[:, None] & channels, other=0.0)
        image = tl.load(image, mask=((n >= T) & (n < end))[:, None] & channels, other=0.0)
        return tl.where((n < T)[:, None], words, image)
    if JOINT == 2:
        x_ptr = tl.where(start < T, words_ptr + words_offset, x_ptr - T.to(tl.int64) * row)
        row = tl.where(start < T, words_row, row)
    return tl.load(x_ptr + wide[:, None] * row + j[None, :], mask=(n < end)[:, None] & channels, other=0.0)


@triton.jit
def places_tile(cos_ptr, sin_ptr, n, end, j, D: tl.constexpr):
    """(cosines, sines) [rows, W / 2] of rows n, one for each pair of channels; 0 from `end` on."""
    place = n.to(tl.int64)[:, None] * D + j[None, :]
    inside = (n < end)[:, None] & (j < D)[None, :]
    pairs: tl.constexpr = (n.shape[0], j.shape[0] // 2, 2)
    cos, _ = tl.split(tl.reshape(tl.load(cos_ptr + place, mask=inside, other=0.0), pairs))
    sin, _ = tl.split(tl.reshape(tl.load(sin_ptr + place, mask=inside, other=0.0), pairs))
    return cos, sin


@triton.jit
def turned(x, n, start, norm_ptr, words_norm_ptr, cos, sin, T, j, eps, D: tl.constexpr, JOINT: tl.constexpr):
    """(y, r) of rows n, x [rows, W] float32: the formula above gives y r, with r = 1 / sqrt(mean_j x[j]^2 + eps)."""
    if JOINT == 2:
        norm_ptr = tl.where(start < T, words_norm_ptr, norm_ptr)
    weight = tl.load(norm_ptr + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
    if JOINT == 1:
        words = tl.load(words_norm_ptr + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
        weight = tl.where((n < T)[:, None], words, weight)
    length = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    even, odd = tl.split(tl.reshape(x * weight, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape), length
