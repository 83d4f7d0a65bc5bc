"""The norm and rotary embedding of rotary.py as parts of Triton's kernels that make codes (codes8.py).

In float32, without the roundings to 16 bits that torch makes between its steps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_tile(source, text, head, H, n, start, end, j, D: tl.constexpr, JOINT: tl.constexpr):
    """Rows n of a head, those below T of the text; 0 from `end` on.

    source: pointers of the image's and the text's, strides of the image's; text: strides of the text's, and T.
    JOINT: 0 without a text, 1 with one, 2 where all rows are its or all the image's, as the row `start` is.
    """
    x_ptr, words_ptr, batch_stride, head_stride, row = source
    words_batch, words_head, words_row, T = text
    wide, channels = n.to(tl.int64), (j < D)[None, :]
    x_ptr += head // H * batch_stride + head % H * head_stride
    if JOINT > 0:
        words_ptr += head // H * words_batch + head % H * words_head
        x_ptr -= T.to(tl.int64) * row
    if JOINT == 1:
        words = words_ptr + wide[:, None] * words_row + j[None, :]
        image = x_ptr + wide[:, None] * row + j[None, :]
        words = tl.load(words, mask=((n < T) & (n < end))[:, None] & channels, other=0.0)
        image = tl.load(image, mask=((n >= T) & (n < end))[:, None] & channels, other=0.0)
        return tl.where((n < T)[:, None], words, image)
    if JOINT == 2:
        x_ptr, row = tl.where(start < T, words_ptr, x_ptr), tl.where(start < T, words_row, row)
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
    """(y, r) of rows n, x [rows, W] float32: rotary.py's formula is y r, with r = 1 / sqrt(mean_j x[j]^2 + eps)."""
    if JOINT == 2:
        norm_ptr = tl.where(start < T, words_norm_ptr, norm_ptr)
    weight = tl.load(norm_ptr + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
    if JOINT == 1:
        words = tl.load(words_norm_ptr + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
        weight = tl.where((n < T)[:, None], words, weight)
    length = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    even, odd = tl.split(tl.reshape(x * weight, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape), length
