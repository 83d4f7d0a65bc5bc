"""Codes of images turned, so that what the weight's gradient sums over lies innermost, as tensor cores want it.

    place(b, y, x) = (b H' + y) W'' + x,    H' = H + ph,   W'' = W, rounded up to 16 where windows have several lines
    pixels[c, place(b, y + ph, x)]        = q[b, y, x, c] << (G-1 - h[b])
    gradient[kx, n, place(b, y, x)]       = q_d[b, y, x - kx dw + pw, n] << (G-1 - h_d[b]),   zeros beyond its lines
    then g[n, ky, kx, c] = sum_k gradient[kx, n, k] pixels[c, k + ky dh W''],    x the input's pixel in both

The gradient is there once for each column of the window, and lines are multiples of 16 bytes: TMA takes blocks that
begin at such places alone. q are the codes that flat (rounding.py) has with other shifts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import remembered
from ..w8a8.window import Window, gradient_window

STEP = 128  # rows of pixels and gradient are multiples of it


def line_of(window: Window) -> int:
    """W''."""
    return window.w if window.kernel[0] == 1 else cdiv(window.w, 16) * 16


def length_of(window: Window) -> int:
    """Of a row of pixels, and of the gradient."""
    return cdiv(window.batch * window.padded[0] * line_of(window), STEP) * STEP


@triton.jit(do_not_specialize=["batch", "H", "W", "HL", "WL", "HP", "WP", "PH", "PW", "top", "left", "step", "width"])
def _turn_kernel(
    flat_ptr, h_ptr, g_ptr, out_ptr, batch, H, W, HL, WL, HP, WP, PH, PW, top, left, step, width, C, CP, length,
    G: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile of places by channels, of one copy: pixel (y - top, x - copy step + left) of images H x W."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    copy = tl.program_id(2)
    image, y, x = k // (HL * WL), k // WL % HL - top, k % WL
    inside = (image < batch) & (y >= 0) & (y < H) & (x < width)
    x = x - copy * step + left
    inside = inside & (x >= 0) & (x < W)
    row = (image * HP + y + PH) * WP + x + PW
    mask = inside[:, None] & (c < C)[None, :]
    q = tl.load(flat_ptr + row.to(tl.int64)[:, None] * CP + c[None, :], mask=mask, other=0).to(tl.int32)
    h = tl.load(h_ptr + image, mask=inside, other=0).to(tl.int32)
    g = tl.load(g_ptr + c, mask=c < C, other=0).to(tl.int32)
    q = (q >> (G - 1 - g)[None, :]) << (G - 1 - h)[:, None]
    at = (copy * C + c).to(tl.int64)[None, :] * length + k[:, None]
    tl.store(out_ptr + at, q.to(tl.int8), mask=(k < length)[:, None] & (c < C)[None, :])


def turn_pixels(flat: Tensor, h: Tensor, g: Tensor, groups: int, window: Window) -> Tensor:
    """flat [rows, C'], h [B], g [C] of rounding.py -> pixels int8 [C, length]."""
    out = flat.new_empty(len(g), length_of(window))
    _plan(window, window, len(g), groups, False)(flat, h, g, out)
    return out


def turn_gradient(flat: Tensor, h: Tensor, g: Tensor, groups: int, window: Window) -> Tensor:
    """The same of the gradient by the output of a convolution with `window` -> int8 [kw N, length]."""
    out = flat.new_empty(window.kernel[1] * len(g), length_of(window))
    _plan(window, gradient_window(window), len(g), groups, True)(flat, h, g, out)
    return out


@remembered
def _plan(window: Window, images: Window, c: int, groups: int, gradient: bool) -> Launch:
    (hp, wp), (ph, pw), length = images.padded, images.padding, length_of(window)
    bc = min(64, max(16, next_power_of_2(c)))
    return Launch(
        _turn_kernel, (length // STEP, cdiv(c, bc), window.kernel[1] if gradient else 1),
        batch=window.batch, H=images.h, W=images.w, HL=window.padded[0], WL=line_of(window), HP=hp, WP=wp, PH=ph,
        PW=pw, top=0 if gradient else window.padding[0], left=window.padding[1] if gradient else 0,
        step=window.dilation[1] if gradient else 0, width=window.w, C=c, CP=cdiv(c, 32) * 32, length=length, G=groups,
        BK=STEP, BC=bc, num_warps=4,
    )  # fmt: skip
