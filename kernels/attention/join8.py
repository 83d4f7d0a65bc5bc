"""The sums of a tile of attention whose blocks of keys were shared among programs, joined, in Triton.

    above = max over parts of peak,  l = sum of total 2^(peak - above),  y = sum of its y 2^(peak - above) / l + mean

A part is [128 queries, D + 2] float32: y, peak and total of some blocks, as product8_hopper.py leaves them. A
program has room for two: the end of one tile, and the beginning of the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..runtime.launch import Launch

ROWS = 32  # queries that are joined at a time


@triton.jit(do_not_specialize=["M", "q_tiles", "k_tiles", "first", "share"])
def _join_kernel(
    part_ptr, v_mean_ptr, y_ptr, M, H, q_tiles, k_tiles, first, share, D: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of a tile whose blocks of keys were shared among programs; their sums are joined."""
    left, tile = tl.program_id(0), first + tl.program_id(0)
    head = tile // q_tiles
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, D)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total, y = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for program in range(left * k_tiles // share, ((left + 1) * k_tiles - 1) // share + 1):
        piece = part_ptr + ((program * 2 + left - program * share // k_tiles) * 128 + row) * (D + 2)
        its_peak, its_total = tl.load(piece + D), tl.load(piece + D + 1)
        above = tl.maximum(peak, its_peak)
        old, new = tl.exp2(peak - above), tl.exp2(its_peak - above)
        total = total * old + its_total * new
        y = y * old[:, None] + tl.load(piece[:, None] + j[None, :]) * new[:, None]
        peak = above
    y = y / total[:, None] + tl.load(v_mean_ptr + head * D + j)[None, :]
    m = tile % q_tiles * 128 + row
    where = ((head // H * M + m).to(tl.int64) * H + head % H) * OUT
    tl.store(
        y_ptr + where[:, None] + j[None, :], y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (j < OUT)[None, :]
    )


def joining(
    tiles: int, first: int, share: int, rows: int, heads: int, q_tiles: int, k_tiles: int, channels: int, width: int
) -> Launch:
    """Of `tiles` tiles from the first-th on, whose k_tiles blocks each were dealt out by `share`.

    Called with (parts, v_means, y).
    """
    return Launch(
        _join_kernel, (tiles, 128 // ROWS), M=rows, H=heads, q_tiles=q_tiles, k_tiles=k_tiles,
        first=first, share=share, D=channels, OUT=width, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
