"""From floats to what integer products read, in Triton: one pass over images or a weight whose peaks are known.

    s = top / limit,   h[r] and g[c] from the peaks,   q = clamp(round(x 2^(h + g) / s))
    columns[r, c] = q << (G-1 - g[c])    for a product that sums over columns: rows of channels, the flat padded
                                         layout of w8a8/window.py; of a weight rows of taps and channels
    across[c, r] = q << (G-1 - h[r])     for a product that sums over rows: turned, so that what is summed over lies
                                         innermost, as 8-bit tensor cores want it; the same padding
    what a sum is worth: row_steps s 2^-h 2^(1-G), column_steps s 2^-g 2^(1-G)

round is floor(v + noise) where there is a seed (noise.py), else to the nearest. Codes of NaN are 0, and s is NaN.
A weight's across is turned round in its taps, too, as the gradient by the input wants it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.int8 import weight_limit
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.rounding import ROUND
from ..runtime.settings import multiprocessors, remembered
from ..w8a8.window import Window, same_window
from .noise import HALVES, ROWS
from .peaks import Peaks, exponents, peaks, power

CHANNELS = 32  # the least K of an 8-bit tensor-core product, and a multiple of what TMA wants rows to be of


@triton.jit
def _scale(top_ptr, limit, TINY: tl.constexpr):
    """(largest magnitude, scale)."""
    top = tl.load(top_ptr).to(tl.float32, bitcast=True)
    scale = tl.div_rn(top, limit)
    return top, tl.where(top < TINY * limit, 1.0, scale)


@triton.jit
def _group(peaks_ptr, at, mask, top, G: tl.constexpr):
    return exponents(tl.load(peaks_ptr + at, mask=mask, other=0).to(tl.float32, bitcast=True), top, G)


@triton.jit
def _code(v, noise, limit, NOISE: tl.constexpr):
    """v float32, NaN as 0 -> int32 in [-limit, limit]."""
    v = tl.where(v == v, v, 0.0)
    v = tl.minimum(tl.maximum(v, -1024.0), 1024.0)  # see runtime/rounding.py
    whole = tl.floor(v + noise) if NOISE else (v + ROUND) - ROUND
    return tl.minimum(tl.maximum(whole, -limit), limit).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "batch", "H", "W", "HP", "WP", "PH", "PW"])
def _images_kernel(
    x_ptr, top_ptr, rows_ptr, columns_ptr, sums_ptr, seed_ptr,
    flat_ptr, across_ptr, row_steps_ptr, column_steps_ptr,
    rows, pitch, batch, H, W, HP, WP, PH, PW, C, CP, limit,
    G: tl.constexpr, NOISE: tl.constexpr, TINY: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """PARTS tiles of BR rows of the flat layout, whose noise comes from the same counters, on a block of columns."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    top, scale = _scale(top_ptr, limit, TINY)
    inverse = tl.div_rn(1.0, scale)
    worth = scale * power(tl.full((1,), 1 - G, tl.int32))
    g = _group(columns_ptr, c, c < C, top, G)
    if tl.program_id(0) == 0:
        tl.store(column_steps_ptr + c, worth * power(-g), mask=c < C)
    block, part = tl.program_id(0) * PARTS // HALVES, tl.program_id(0) * PARTS % HALVES
    if NOISE:
        counter = block * BR + tl.arange(0, BR)
        one, two, three, four = tl.philox(tl.load(seed_ptr), counter[:, None] + c[None, :] * 0, c[None, :], 0, 0)
    total = tl.zeros((BC,), tl.int32)
    for i in tl.static_range(PARTS):
        r = (block * HALVES + part + i) * BR + tl.arange(0, BR)
        image, y, x = r // (HP * WP), r // WP % HP - PH, r % WP - PW
        inside = (image < batch) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        h = _group(rows_ptr, image, inside, top, G)
        at = ((image * H + y) * W + x).to(tl.int64)[:, None] * C + c[None, :]
        v = tl.load(x_ptr + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        v = v * (power(h)[:, None] * power(g)[None, :] * inverse)
        if NOISE:
            place = (part + i) // 2
            word = tl.where(place == 0, one, tl.where(place == 1, two, tl.where(place == 2, three, four)))
            noise = ((word >> ((part + i) % 2 * 16).to(tl.uint32)) & 0xFFFF).to(tl.float32)
            q = _code(v, (noise + 0.5) * 0.0000152587890625, limit, True)
            q = tl.where(inside[:, None] & (c < C)[None, :], q, 0)
        else:
            q = _code(v, v, limit, False)
        columns = (q << (G - 1 - g)[None, :]).to(tl.int8)
        mask = (r < rows)[:, None] & (c < CP)[None, :]
        tl.store(flat_ptr + r.to(tl.int64)[:, None] * CP + c[None, :], columns, mask=mask)
        turned = q << (G - 1 - h)[:, None]
        mask = (r < pitch)[:, None] & (c < C)[None, :]
        tl.store(across_ptr + c[None, :].to(tl.int64) * pitch + r[:, None], turned.to(tl.int8), mask=mask)
        if NOISE:
            total += tl.sum(turned, 0)
        if tl.program_id(1) == 0:
            tl.store(row_steps_ptr + image, worth * power(-h), mask=inside)
    if NOISE:
        tl.atomic_add(sums_ptr + c, total, mask=c < C, sem="relaxed")


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
    q = _code(v, v, limit, False)
    at = (n.to(tl.int64) * TAPS + tap)[:, None] * CP + c[None, :]
    mask = (n < N)[:, None] & (c < CP)[None, :]
    tl.store(codes_ptr + at, (q << (G - 1 - g)[None, :]).to(tl.int8), mask=mask)
    at = (c.to(tl.int64) * TAPS + (TAPS - 1 - tap))[None, :] * NP + n[:, None]
    mask = (n < NP)[:, None] & (c < C)[None, :]
    tl.store(turned_ptr + at, (q << (G - 1 - h)[:, None]).to(tl.int8), mask=mask)
    tl.store(row_steps_ptr + n, worth * power(-h), mask=n < N)
    tl.store(column_steps_ptr + c, worth * power(-g), mask=c < C)


def encode_images(
    x: Tensor, bits: int, groups: int, padding: tuple[int, int], seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, H, W, C] float -> flat int8 [rows, C'], across int8 [C, rows'], row_steps [B], column_steps [C] float32,
    sums int32 [C] of across over its rows (only with a seed)."""
    x = x.contiguous()
    b, h, w, c = x.shape
    window = same_window(b, h, w, padding=padding)
    found = peaks(x, b, c, groups)
    launch = _images(window, c, bits, groups, seed is not None, x.device)
    flat = x.new_empty(window.rows, stored(c), dtype=torch.int8)
    across = x.new_empty(c, cdiv(window.rows, ROWS) * ROWS, dtype=torch.int8)
    row_steps, column_steps = (x.new_empty(size, dtype=torch.float32) for size in (b, c))
    launch(x, found.top, found.rows, found.columns, found.sums, seed, flat, across, row_steps, column_steps)
    return flat, across, row_steps, column_steps, found.sums[:c]


def encode_weight(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [N, kh, kw, C] float -> codes int8 [N, taps C'], turned int8 [C, taps N'], row_steps [N], column_steps
    [C] float32."""
    weight = weight.contiguous()
    n, kh, kw, c = weight.shape
    found: Peaks = peaks(weight, n, c, groups)
    codes = weight.new_empty(n, kh * kw * stored(c), dtype=torch.int8)
    turned = weight.new_empty(c, kh * kw * stored(n), dtype=torch.int8)
    row_steps, column_steps = (weight.new_empty(size, dtype=torch.float32) for size in (n, c))
    _weight(n, c, kh * kw, bits, groups)(
        weight, found.top, found.rows, found.columns, codes, turned, row_steps, column_steps
    )
    return codes, turned, row_steps, column_steps


def stored(channels: int) -> int:
    return cdiv(channels, CHANNELS) * CHANNELS


@remembered
def _images(window: Window, c: int, bits: int, groups: int, noise: bool, device) -> Launch:
    bc = min(64, next_power_of_2(stored(c)))
    columns, span = cdiv(stored(c), bc), ROWS * HALVES
    few = cdiv(window.rows, span) * columns < 2 * multiprocessors(device)
    parts = HALVES // 4 if few else HALVES
    (hp, wp), (ph, pw), limit = window.padded, window.padding, weight_limit(bits)
    return Launch(
        _images_kernel, (cdiv(window.rows, ROWS * parts), columns),
        rows=window.rows, pitch=cdiv(window.rows, ROWS) * ROWS, batch=window.batch, H=window.h, W=window.w, HP=hp,
        WP=wp, PH=ph, PW=pw, C=c, CP=stored(c), limit=float(limit), G=groups, NOISE=noise,
        TINY=torch.finfo(torch.float32).tiny, PARTS=parts, HALVES=HALVES, BR=ROWS, BC=bc, num_warps=8 if noise else 4,
    )  # fmt: skip


@remembered
def _weight(n: int, c: int, taps: int, bits: int, groups: int) -> Launch:
    bn, bc = (min(64, next_power_of_2(stored(size))) for size in (n, c))
    return Launch(
        _weight_kernel, (cdiv(stored(n), bn), cdiv(stored(c), bc), taps),
        N=n, C=c, NP=stored(n), CP=stored(c), limit=float(weight_limit(bits)), TAPS=taps, G=groups,
        TINY=torch.finfo(torch.float32).tiny, BN=bn, BC=bc, num_warps=4,
    )  # fmt: skip
