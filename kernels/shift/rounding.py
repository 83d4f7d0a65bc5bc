"""From floats to int8 codes that sum over columns, in Triton: one pass over images or a weight whose peaks are known.

    s = top / limit,   h[r] and g[c] from the peaks,   q = clamp(round(x 2^(h + g) / s))
    flat[r, c] = q << (G-1 - g[c]):      rows of channels, in the flat padded layout of w8a8/window.py
    what a sum is worth:                 over columns row_steps s 2^-h 2^(1-G), over rows column_steps s 2^-g 2^(1-G)

round is floor(v + noise) where there is a seed (noise.py), else to the nearest. Codes of NaN are 0, and s is NaN.
Of a weight there are two operands, turned[c, r] = q << (G-1 - h[r]) beside the first: what sums over outputs, its
taps in the opposite order, as the gradient by the input wants it. For images turned.py makes that of the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.int8 import weight_limit
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import remembered
from ..w8a8.window import Window, same_window, stored_channels
from .coding import code, noise_at, scale_of
from .noise import ONE, TWO
from .peaks import exponents, peaks, power


class ImageCodes(NamedTuple):
    """flat int8 [rows, C']; h int8 [B], g int8 [C]; row_steps float32 [B], column_steps [C]; sums int32 [C]: of the
    codes with the rows' shifts over all rows, where codes were made with a seed."""

    flat: Tensor
    h: Tensor
    g: Tensor
    row_steps: Tensor
    column_steps: Tensor
    sums: Tensor


@triton.jit
def _scale(top_ptr, limit, TINY: tl.constexpr):
    """(largest magnitude, scale)."""
    top = tl.load(top_ptr).to(tl.float32, bitcast=True)
    return top, scale_of(top, limit, TINY)


@triton.jit
def _group(peaks_ptr, at, mask, top, G: tl.constexpr):
    return exponents(tl.load(peaks_ptr + at, mask=mask, other=0).to(tl.float32, bitcast=True), top, G)


@triton.jit(do_not_specialize=["rows", "batch", "H", "W", "HP", "WP", "PH", "PW"])
def _images_kernel(
    x_ptr, top_ptr, rows_ptr, columns_ptr, sums_ptr, seed_ptr,
    flat_ptr, h_ptr, g_ptr, row_steps_ptr, column_steps_ptr,
    rows, batch, H, W, HP, WP, PH, PW, C, CP, limit,
    G: tl.constexpr, NOISE: tl.constexpr, TINY: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile of rows of the flat layout by columns."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    top, scale = _scale(top_ptr, limit, TINY)
    worth = scale * power(tl.full((1,), 1 - G, tl.int32))
    g = _group(columns_ptr, c, c < C, top, G)
    image, y, x = r // (HP * WP), r // WP % HP - PH, r % WP - PW
    inside = (image < batch) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    h = _group(rows_ptr, image, inside, top, G)
    at = ((image * H + y) * W + x).to(tl.int64)[:, None] * C + c[None, :]
    mask = inside[:, None] & (c < C)[None, :]
    v = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = v * (power(h)[:, None] * power(g)[None, :] * tl.div_rn(1.0, scale))
    if NOISE:
        q = code(v, noise_at(at, seed_ptr, ONE, TWO), limit, True)
        q = tl.where(mask, q, 0)
        tl.atomic_add(sums_ptr + c, tl.sum(q << (G - 1 - h)[:, None], 0), mask=c < C, sem="relaxed")
    else:
        q = code(v, v, limit, False)
    at = r.to(tl.int64)[:, None] * CP + c[None, :]
    tl.store(flat_ptr + at, (q << (G - 1 - g)[None, :]).to(tl.int8), mask=(r < rows)[:, None] & (c < CP)[None, :])
    if tl.program_id(1) == 0:
        tl.store(h_ptr + image, h.to(tl.int8), mask=inside)
        tl.store(row_steps_ptr + image, worth * power(-h), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(g_ptr + c, g.to(tl.int8), mask=c < C)
        tl.store(column_steps_ptr + c, worth * power(-g), mask=c < C)


@triton.jit
def _weight_kernel(
    w_ptr, top_ptr, rows_ptr, columns_ptr, codes_ptr, turned_ptr, row_steps_ptr, column_steps_ptr,
    N, C, NP, CP, limit, TAPS: tl.constexpr, G: tl.constexpr, TINY: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile of outputs by inputs at one tap."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    tap = tl.program_id(2)
    top, scale = _scale(top_ptr, limit, TINY)
    worth = scale * power(tl.full((1,), 1 - G, tl.int32))
    h, g = _group(rows_ptr, n, n < N, top, G), _group(columns_ptr, c, c < C, top, G)
    at = (n.to(tl.int64) * TAPS + tap)[:, None] * C + c[None, :]
    v = tl.load(w_ptr + at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    v = v * (power(h)[:, None] * power(g)[None, :] * tl.div_rn(1.0, scale))
    q = code(v, v, limit, False)
    at = (n.to(tl.int64) * TAPS + tap)[:, None] * CP + c[None, :]
    mask = (n < N)[:, None] & (c < CP)[None, :]
    tl.store(codes_ptr + at, (q << (G - 1 - g)[None, :]).to(tl.int8), mask=mask)
    at = (c.to(tl.int64) * TAPS + (TAPS - 1 - tap))[None, :] * NP + n[:, None]
    mask = (n < NP)[:, None] & (c < C)[None, :]
    tl.store(turned_ptr + at, (q << (G - 1 - h)[:, None]).to(tl.int8), mask=mask)
    tl.store(row_steps_ptr + n, worth * power(-h), mask=n < N)
    tl.store(column_steps_ptr + c, worth * power(-g), mask=c < C)


def encode_images(x: Tensor, bits: int, groups: int, padding: tuple[int, int], seed: Tensor | None) -> ImageCodes:
    """Codes of x [B, H, W, C] float."""
    x = x.contiguous()
    b, h, w, c = x.shape
    window = same_window(b, h, w, padding=padding)
    found = peaks(x, b, c, groups)
    flat = x.new_empty(window.rows, stored_channels(c), dtype=torch.int8)
    shifts = [x.new_empty(size, dtype=torch.int8) for size in (b, c)]
    steps = [x.new_empty(size, dtype=torch.float32) for size in (b, c)]
    launch = _images(window, c, bits, groups, seed is not None)
    launch(x, found.top, found.rows, found.columns, found.sums, seed, flat, *shifts, *steps)
    return ImageCodes(flat, *shifts, *steps, found.sums[:c])


def encode_weight(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [N, kh, kw, C] float -> codes int8 [N, taps C'], turned int8 [C, taps N'], row_steps [N], column_steps
    [C] float32."""
    weight = weight.contiguous()
    n, kh, kw, c = weight.shape
    found = peaks(weight, n, c, groups)
    codes = weight.new_empty(n, kh * kw * stored_channels(c), dtype=torch.int8)
    turned = weight.new_empty(c, kh * kw * stored_channels(n), dtype=torch.int8)
    steps = [weight.new_empty(size, dtype=torch.float32) for size in (n, c)]
    _weight(n, c, kh * kw, bits, groups)(weight, found.top, found.rows, found.columns, codes, turned, *steps)
    return codes, turned, *steps


@remembered
def _images(window: Window, c: int, bits: int, groups: int, noise: bool) -> Launch:
    wide = stored_channels(c)
    bc = min(128, next_power_of_2(wide))
    br = min(4096 // bc, next_power_of_2(window.rows))
    (hp, wp), (ph, pw) = window.padded, window.padding
    return Launch(
        _images_kernel, (cdiv(window.rows, br), cdiv(wide, bc)),
        rows=window.rows, batch=window.batch, H=window.h, W=window.w, HP=hp, WP=wp, PH=ph, PW=pw, C=c, CP=wide,
        limit=float(weight_limit(bits)), G=groups, NOISE=noise, TINY=torch.finfo(torch.float32).tiny,
        ONE=ONE, TWO=TWO, BR=br, BC=bc, num_warps=4,
    )  # fmt: skip


@remembered
def _weight(n: int, c: int, taps: int, bits: int, groups: int) -> Launch:
    bn, bc = (min(64, next_power_of_2(stored_channels(size))) for size in (n, c))
    return Launch(
        _weight_kernel, (cdiv(stored_channels(n), bn), cdiv(stored_channels(c), bc), taps),
        N=n, C=c, NP=stored_channels(n), CP=stored_channels(c), limit=float(weight_limit(bits)), TAPS=taps, G=groups,
        TINY=torch.finfo(torch.float32).tiny, BN=bn, BC=bc, num_warps=4,
    )  # fmt: skip
