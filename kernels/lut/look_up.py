"""Products of few rows with binary-coded weights by look-up tables, in Triton.

    T[m, p, e] = sum_{j < 4} (2 bit_j(e) - 1) x[m, k(p, j)],    e in [0, 16)
    y[m, n]    = sum_g sum_i alpha[n, g, i] sum_{p in g} T[m, p, c_i[n, p]]  +  z[n, g] sum_{k in g} x[m, k]  +  b[n]

c_i[n, p] are four signs of plane i, a nibble of a word, and k(p, j) their inputs (formats/bcq.py). No weight is ever
made, and none multiplied: four inputs cost a plane one look-up and one addition.

Two launches: the first makes the tables, the second looks them up. "LUT-GEMM" (arXiv:2206.09557) has tables of 256
sums of eight inputs in shared memory, made anew for each 2048 outputs. Here a table is 64 bytes, so that all threads
of a warp that ask it can be answered at once, and tables stay in the L1 cache, which all programs of a multiprocessor
share. (`tl.gather`, Triton's own look-up in registers, compiles to seven exchanges between lanes for one value, and
was left.)

A program has the 64 outputs of a tile and R rows, and goes through W words of inputs at a time. Sums are float32, in
a fixed order; x is not rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.bcq import TILE, WORD
from ..runtime.integers import cdiv
from ..runtime.launch import Launch, planned
from ..runtime.workspace import Workspace

WORDS = 8  # of a row that a program of the first launch has


@triton.jit
def _tables_kernel(x_ptr, tables_ptr, totals_ptr, K, stride_m, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """Tables [8 words, 16] and sums of inputs [words] of a part of a row."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * WORDS
    nibble = first * 8 + tl.arange(0, 8 * WORDS)
    entry = tl.arange(0, 16)[None, :]
    inputs = nibble // 8 * 32 + nibble % 4 * 8 + nibble // 4 % 2
    table = tl.zeros((8 * WORDS, 16), tl.float32)
    sums = tl.zeros((8 * WORDS,), tl.float32)
    for j in tl.static_range(4):
        k = inputs + 2 * j
        value = tl.load(x_ptr + row * stride_m + k, mask=k < K, other=0).to(tl.float32)
        table += tl.where((entry >> j & 1) == 1, value[:, None], -value[:, None])
        sums += value
    there = nibble < WIDTH * 8
    at = tables_ptr + (row * (WIDTH * 8) + nibble[:, None]) * 16 + entry
    tl.store(at, table, mask=there[:, None])
    words = first + tl.arange(0, WORDS)
    tl.store(totals_ptr + row * WIDTH + words, tl.sum(tl.reshape(sums, (WORDS, 8)), 1), mask=words < WIDTH)


@triton.jit
def _look_up_kernel(
    tables_ptr, totals_ptr, words_ptr, alphas_ptr, offsets_ptr, bias_ptr, y_ptr, M, N, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """SPAN: words of a group."""
    tile, row = tl.program_id(0), tl.program_id(1) * R
    n = tl.arange(0, TILE)[None, :]
    words_ptr += tile.to(tl.int64) * (WIDTH * BITS * TILE) + n
    sums = ()
    for _ in tl.static_range(R):
        sums += (tl.zeros((W, TILE), tl.float32),)
    for first in tl.range(0, WIDTH, W):
        w = first + tl.arange(0, W)[:, None]
        there = w < WIDTH
        group = tile * GROUPS + tl.minimum(w // SPAN, GROUPS - 1)
        for i in tl.static_range(BITS):
            words = tl.load(words_ptr + (w * BITS + i) * TILE, mask=there, other=0)
            alpha = tl.load(alphas_ptr + (group * BITS + i) * TILE + n, mask=there, other=0).to(tl.float32)
            added = ()
            for r in tl.static_range(R):  # past the last row it repeats, and is not stored
                tables = tables_ptr + (tl.minimum(row + r, M - 1) * WIDTH + w) * 128
                found = tl.zeros((W, TILE), tl.float32)
                for p in tl.static_range(8):
                    found += tl.load(tables + p * 16 + (words >> 4 * p & 15), mask=there, other=0)
                added += (sums[r] + found * alpha,)
            sums = added
        if offsets_ptr is not None:
            offset = tl.load(offsets_ptr + group * TILE + n, mask=there, other=0).to(tl.float32)
            added = ()
            for r in tl.static_range(R):
                total = tl.load(totals_ptr + tl.minimum(row + r, M - 1) * WIDTH + w, mask=there, other=0)
                added += (sums[r] + offset * total,)
            sums = added
    n = tile * TILE + tl.arange(0, TILE)
    bias = tl.zeros((TILE,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)
    for r in tl.static_range(R):
        y = tl.sum(sums[r], 0) + bias
        m = row + r + tl.zeros((TILE,), tl.int32)
        tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(n < N) & (m < M))


def look_up(
    x: Tensor, qweight: Tensor, alphas: Tensor, offsets: Tensor | None, bias: Tensor | None, out: Tensor, config: dict
) -> None:
    """Fill out [M, N] from x [M, K], whose columns are contiguous; operands as `bcq_linear` has checked them.

    config: W, words of inputs at a time, and num_warps, powers of two; R, rows of a program, 1, 2 or 4.
    """
    (m, n), k, groups = out.shape, x.shape[1], alphas.shape[1]
    make, use, room = _launches(tuple(config.items()), m, n, k, groups, qweight.shape[2], x.stride(0))
    tables, totals = room.take(x)
    make(x, tables, totals)
    use(tables, totals, qweight, alphas, offsets, bias, out)


def _launches(
    config: tuple, m: int, n: int, k: int, groups: int, bits: int, stride: int
) -> tuple[Launch, Launch, Workspace]:
    width = cdiv(k, WORD)
    make = _make({}, m, k, stride)
    use = _use(dict(config), m, n, k, groups, bits)
    return make, use, Workspace(((m, width * 8, 16), torch.float32), ((m, width), torch.float32))


@planned
def _make(config: dict, m: int, k: int, stride: int) -> Launch:
    width = cdiv(k, WORD)
    return Launch(
        _tables_kernel, (m, cdiv(width, WORDS)), K=k, stride_m=stride, WIDTH=width, WORDS=WORDS, num_warps=4,
    )  # fmt: skip


@planned
def _use(config: dict, m: int, n: int, k: int, groups: int, bits: int) -> Launch:
    width, rows = cdiv(k, WORD), config["R"]
    return Launch(
        _look_up_kernel, (cdiv(n, TILE), cdiv(m, rows)), M=m, N=n, WIDTH=width, GROUPS=groups,
        SPAN=width if groups == 1 else k // groups // WORD, BITS=bits, W=config["W"], R=rows, TILE=TILE,
        num_warps=config["num_warps"],
    )  # fmt: skip
