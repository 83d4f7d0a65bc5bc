"""The norm and rotary embedding of rotary.py as parts of Triton's kernels that make codes (codes8.py).

In float32, without the roundings to 16 bits that torch makes between its steps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_tile(
    x_ptr, words_ptr, words_offset, n, row, words_row, T, end, j, D: tl.constexpr, JOINT: tl.constexpr
):  # fmt: skip
    """Rows n of a head, those below T of the text; 0 from `end` on."""
    channels = (j < D)[None, :]
    if JOINT:
        image = tl.load(
            x_ptr + (n - T).to(tl.int64)[:, None] * row + j[None, :], mask=((n >= T) & (n < end))[:, None] & channels,
            other=0.0,
        )  # fmt: skip
        words = tl.load(
            words_ptr + words_offset + n.to(tl.int64)[:, None] * words_row + j[None, :],
            mask=((n < T) & (n < end))[:, None] & channels, other=0.0,
        )  # fmt: skip
        return tl.where((n < T)[:, None], words, image)
    else:
        return tl.load(
            x_ptr + n.to(tl.int64)[:, None] * row + j[None, :], mask=(n < end)[:, None] & channels, other=0.0
        )


@triton.jit
def turned(
    x, n, norm_ptr, words_norm_ptr, cos_ptr, sin_ptr, T, end, j, eps, D: tl.constexpr, JOINT: tl.constexpr
):  # fmt: skip
    """The formula above of rows n, x [rows, W] float32."""
    weight = tl.load(norm_ptr + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
    if JOINT:
        words = tl.load(words_norm_ptr + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
        weight = tl.where((n < T)[:, None], words, weight)
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None] * weight
    place = n.to(tl.int64)[:, None] * D + j[None, :]
    inside = (n < end)[:, None] & (j < D)[None, :]
    pairs: tl.constexpr = (x.shape[0], x.shape[1] // 2, 2)
    cos, _ = tl.split(tl.reshape(tl.load(cos_ptr + place, mask=inside, other=0.0), pairs))
    sin, _ = tl.split(tl.reshape(tl.load(sin_ptr + place, mask=inside, other=0.0), pairs))
    even, odd = tl.split(tl.reshape(x, pairs))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)
