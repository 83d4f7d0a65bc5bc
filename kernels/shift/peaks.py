"""The largest magnitudes of a tensor [R, P, C] in Triton: of all, of each row, and of each column after rows' shifts.

    top = max |x|,   row[r] = max over p, c of |x|,   h[r] = the largest h < G with row[r] 2^h <= top
    column[c] = max over r, p of |x| 2^h[r]

x is read once where P > 1, [R, C] peaks in between; twice where P = 1. Maxima are of the bits as whole numbers, which
are ordered as the floats are, NaN on top, and whose order does not matter: results are the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import multiprocessors, remembered
from .coding import bits_of


class Peaks(NamedTuple):
    """int32, the bits of floats: top [1], rows [R], columns [C]; sums [C] zeros."""

    top: Tensor
    rows: Tensor
    columns: Tensor
    sums: Tensor


@triton.jit
def exponents(peak, top, G: tl.constexpr):
    """The largest e <= G - 1 with peak 2^e <= top, int32."""
    found = (peak * 2.0 <= top).to(tl.int32) if G > 1 else (peak != peak).to(tl.int32) * 0
    for e in tl.static_range(2, G):
        found += (peak * (1 << e) <= top).to(tl.int32)
    return found


@triton.jit
def power(e):
    """2^e, exact."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["P", "chunk"])
def _pixels_kernel(x_ptr, peaks_ptr, rows_ptr, top_ptr, P, C, chunk, BP: tl.constexpr, BC: tl.constexpr):
    """`chunk` pixels of a row, on a block of columns -> maxima of the pair, the row, and all."""
    row = tl.program_id(0)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    start = tl.program_id(1) * chunk
    largest = tl.zeros((BP, BC), tl.int32)
    for first in range(start, tl.minimum(start + chunk, P), BP):
        p = first + tl.arange(0, BP)
        at = (row.to(tl.int64) * P + p)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=(p < P)[:, None] & (c < C)[None, :], other=0.0)
        largest = tl.maximum(largest, bits_of(x))
    peaks = tl.max(largest, 0)
    tl.atomic_max(peaks_ptr + row * C + c, peaks, mask=c < C, sem="relaxed")
    tl.atomic_max(rows_ptr + row, tl.max(peaks, 0), sem="relaxed")
    tl.atomic_max(top_ptr, tl.max(peaks, 0), sem="relaxed")


@triton.jit(do_not_specialize=["R"])
def _rows_kernel(x_ptr, rows_ptr, top_ptr, R, C, BR: tl.constexpr, BC: tl.constexpr):
    """Rows of x [R, C] -> their maxima, and that of all."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    largest = tl.zeros((BR, BC), tl.int32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        largest = tl.maximum(
            largest, bits_of(tl.load(x_ptr + at, mask=(r < R)[:, None] & (c < C)[None, :], other=0.0))
        )
    rows = tl.max(largest, 1)
    tl.store(rows_ptr + r, rows, mask=r < R)
    tl.atomic_max(top_ptr, tl.max(rows, 0), sem="relaxed")


@triton.jit(do_not_specialize=["R", "chunk"])
def _columns_kernel(
    x_ptr, rows_ptr, top_ptr, columns_ptr, R, C, chunk, G: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """`chunk` rows of x [R, C], or of peaks in bits, on a block of columns -> maxima after the rows' shifts."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    start = tl.program_id(0) * chunk
    top = tl.load(top_ptr).to(tl.float32, bitcast=True)
    largest = tl.zeros((BR, BC), tl.int32)
    for first in range(start, tl.minimum(start + chunk, R), BR):
        r = first + tl.arange(0, BR)
        row = tl.load(rows_ptr + r, mask=r < R, other=0).to(tl.float32, bitcast=True)
        x = tl.load(
            x_ptr + r.to(tl.int64)[:, None] * C + c[None, :], mask=(r < R)[:, None] & (c < C)[None, :], other=0
        )
        x = x.to(tl.float32, bitcast=True) if x.dtype == tl.int32 else x.to(tl.float32)
        largest = tl.maximum(largest, bits_of(x * power(exponents(row, top, G))[:, None]))
    tl.atomic_max(columns_ptr + c, tl.max(largest, 0), mask=c < C, sem="relaxed")


def peaks(x: Tensor, rows: int, channels: int, groups: int) -> Peaks:
    """x of rows * P * channels values, contiguous, float. Of one group, columns stay zero: they have no shifts."""
    pixels = x.numel() // (rows * channels)
    r, c = cdiv(rows, 4) * 4, cdiv(channels, 4) * 4  # 16 bytes: where every part begins
    space = x.new_zeros(4 + r + 2 * c + (rows * channels if pixels > 1 else 0), dtype=torch.int32)
    top, by_row, columns, sums, both = space.split([4, r, c, c, space.numel() - 4 - r - 2 * c])
    over_pixels, over_rows, over_columns = _plan(rows, pixels, channels, groups, x.device)
    if pixels > 1:
        over_pixels(x, both, by_row, top)
    else:
        over_rows(x, by_row, top)
    if groups > 1:
        over_columns(both if pixels > 1 else x, by_row, top, columns)
    return Peaks(top, by_row, columns, sums)


@remembered
def _plan(rows: int, pixels: int, channels: int, groups: int, device) -> tuple[Launch, Launch, Launch]:
    processors = multiprocessors(device)
    bc = min(128, max(16, next_power_of_2(channels)))
    bp = min(2048 // bc, next_power_of_2(pixels))
    parts = min(cdiv(pixels, bp), max(1, cdiv(4 * processors, rows * cdiv(channels, bc))))
    chunk = cdiv(cdiv(pixels, parts), bp) * bp
    over_pixels = Launch(
        _pixels_kernel, (rows, cdiv(pixels, chunk), cdiv(channels, bc)),
        P=pixels, C=channels, chunk=chunk, BP=bp, BC=bc, num_warps=4,
    )  # fmt: skip
    wide = min(1024, max(16, next_power_of_2(channels)))
    br = max(1, min(2048 // wide, next_power_of_2(rows)))
    over_rows = Launch(_rows_kernel, (cdiv(rows, br),), R=rows, C=channels, BR=br, BC=wide, num_warps=4)
    few = min(64, bc)
    br = min(32, next_power_of_2(rows))
    parts = min(cdiv(rows, br), max(1, cdiv(4 * processors, cdiv(channels, few))))
    chunk = cdiv(cdiv(rows, parts), br) * br
    over_columns = Launch(
        _columns_kernel, (cdiv(rows, chunk), cdiv(channels, few)),
        R=rows, C=channels, chunk=chunk, G=groups, BR=br, BC=few, num_warps=4,
    )  # fmt: skip
    return over_pixels, over_rows, over_columns
