"""Products of few rows with binary-coded weights on tensor cores, in Triton: sign planes as matrices of -1 and 1.

    y[m, n] = sum_g sum_i alpha[n, g, i] (sum_{k in g} b_i[n, k] x[m, k])  +  z[n, g] sum_{k in g} x[m, k]  +  b[n]

Nothing is looked up here, and no weight is made either: the inner sums are products of x in 16 bits by signs, which
two bit operations make of two bits in registers; scales come after them, once for a group and plane. One plane of
signs serves all rows, where look-ups are paid for each. Sums are float32, in a fixed order; x of float32 is rounded
to bf16. Floor in bytes: q N K / 8 for the words, 2 q N K / g for their scales.

As in w4/products/product_short.py a program has one block of outputs and few warps, which divide the units of inputs
(a group, or 128 inputs where a row has one) and meet at the end; bits go from memory to the tensor cores through
registers alone. Lane 4 r + t of a warp holds rows r and r + 8 of the signs, column r of x, and of a unit of U words
the t-th quarter. Bits j and j + 16 of a word are two inputs in a row (formats/bcq.py), so that they share an int32
with the pair of 16-bit signs that they become.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.bcq import TILE, WORD
from ..runtime.integers import cdiv
from ..runtime.launch import Launch, planned
from ..w4.products.short_ends import finish, meet
from ..w4.products.short_operands import QUADS, places

MINUS = {torch.bfloat16: 0xBF80BF80 - 2**32, torch.float16: 0xBC00BC00 - 2**32}  # -1, twice


@triton.jit
def _pair(words, PAIR: tl.constexpr, minus, dtype: tl.constexpr):
    """The signs of bits PAIR and PAIR + 16: a set bit turns the sign of -1."""
    pair = (words << (15 - PAIR)) & -0x7FFF8000 ^ minus
    return pair.to(tl.int16).to(dtype, bitcast=True), (pair >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _signs(words, FIRST: tl.constexpr, minus, dtype: tl.constexpr, BN: tl.constexpr):
    """words [reads] -> four pairs of signs of each from FIRST on [warps, BN, 32]."""
    low0, high0 = _pair(words, FIRST, minus, dtype)
    low1, high1 = _pair(words, FIRST + 1, minus, dtype)
    low2, high2 = _pair(words, FIRST + 2, minus, dtype)
    low3, high3 = _pair(words, FIRST + 3, minus, dtype)
    even = tl.join(tl.join(low0, low2), tl.join(high0, high2))
    signs = tl.join(even, tl.join(tl.join(low1, low3), tl.join(high1, high3)))
    warps: tl.constexpr = words.shape[0] // (BN * 4)
    signs = tl.reshape(signs, (BN // 8, warps, 8, 4, 2, 2, 2))
    signs = tl.permute(signs, (1, 0, 2, 4, 3, 6, 5) if QUADS else (1, 0, 2, 4, 6, 3, 5))
    return tl.reshape(signs, (warps, BN, 32))


@triton.jit
def _inputs(x, BM: tl.constexpr):
    """x [reads, 8] -> [warps, 32, BM], inputs in the order of `_signs`."""
    warps: tl.constexpr = x.shape[0] // (BM * 4)
    x = tl.reshape(x, (BM // 8, warps, 8, 4, 2, 2, 2))
    x = tl.permute(x, (1, 4, 3, 5, 6, 0, 2) if QUADS else (1, 4, 5, 3, 6, 0, 2))
    return tl.reshape(x, (warps, 32, BM))


@triton.jit
def _spread(values, BN: tl.constexpr, WARPS: tl.constexpr):
    """Scales [reads] of each lane's rows, as they multiply its sums."""
    return tl.permute(tl.reshape(values, (BN // 8, WARPS, 8, 4)), (1, 0, 2, 3))[:, :, :, None, :, None]


@triton.jit
def _planes_kernel(
    x_ptr, words_ptr, alphas_ptr, offsets_ptr, bias_ptr, y_ptr, M, N, K, stride_m, minus, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, U: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Rows m of a block, BN outputs of a tile, a unit of U words for each warp in turn."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UNITS: tl.constexpr = (WIDTH + U - 1) // U
    tile, place = tl.program_id(0) // (TILE // BN), tl.program_id(0) % (TILE // BN) * BN
    t, row, warp = places(BN // 8, WARPS)
    column, first_bit = t * U // 4, t * U * 4 % 16  # of a unit's words; the quarter begins amid one
    words_ptr += tile.to(tl.int64) * (WIDTH * BITS * TILE) + place + row
    alphas_ptr += tile * (GROUPS * BITS * TILE) + place + row
    words = ()
    for i in tl.static_range(BITS):
        w = warp * U + column
        words += (tl.load(words_ptr + (w * BITS + i) * TILE, mask=w < WIDTH, other=0),)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    t_x, row_x, warp_x = places(BM // 8, WARPS)
    row_x = tl.minimum(tl.program_id(1) * BM + row_x, M - 1)  # past the last row it repeats, and is not stored
    k_x = (t_x * U * 8)[:, None] + tl.arange(0, 8)[None, :]
    x_ptr += row_x.to(tl.int64)[:, None] * stride_m
    sums = tl.zeros((WARPS, BN // 8, 8, BM // 8, 4, 2), tl.float32)
    for first in tl.range(0, UNITS, WARPS, num_stages=1):
        unit = first + warp
        group = unit if GROUPS > 1 else unit * 0
        k = (first + warp_x)[:, None] * (U * 32) + k_x
        there = ((first + warp_x) < UNITS)[:, None]
        inputs = ()
        for s in tl.static_range(U):
            inputs += (_inputs(tl.load(x_ptr + k + 8 * s, mask=there & (k + 8 * s < K), other=0.0), BM),)
        for i in tl.static_range(BITS):
            alpha = tl.load(alphas_ptr + (group * BITS + i) * TILE, mask=unit < UNITS, other=0).to(tl.float32)
            bits = words[0] >> first_bit
            w = (unit + WARPS) * U + column
            words = words[1:] + (tl.load(words_ptr + (w * BITS + i) * TILE, mask=w < WIDTH, other=0),)
            part = tl.zeros((WARPS, BN, BM), tl.float32)
            for s in tl.static_range(U):
                part = tl.dot(_signs(bits, 4 * s, minus, dtype, BN), inputs[s], part)
            sums += tl.reshape(part, (WARPS, BN // 8, 8, BM // 8, 4, 2)) * _spread(alpha, BN, WARPS)
        if offsets_ptr is not None:
            at = offsets_ptr + (tile * GROUPS + group) * TILE + place + row
            offset = tl.load(at, mask=unit < UNITS, other=0).to(tl.float32)
            part = tl.zeros((WARPS, BN, BM), tl.float32)
            for s in tl.static_range(U):
                part = tl.dot(tl.full((WARPS, BN, 32), 1.0, dtype), inputs[s], part)
            sums += tl.reshape(part, (WARPS, BN // 8, 8, BM // 8, 4, 2)) * _spread(offset, BN, WARPS)
    n = tile * TILE + place + tl.arange(0, BN)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    finish(meet(sums, BN, BM), m, n, (1.0, 0.0), (0.0, bias), y_ptr, M, N, 0, bias_ptr is not None, "")


def planes(
    x: Tensor, qweight: Tensor, alphas: Tensor, offsets: Tensor | None, bias: Tensor | None, out: Tensor, config: dict
) -> None:
    """Fill out [M, N] from x [M, K] of 16 bits, whose columns are contiguous; operands as `bcq_linear` checked them.

    config: BM, rows, from 8 on, BN, outputs, 16, 32 or 64, and num_warps of a program, powers of two; maxnreg to
    limit registers.
    """
    (m, n), k, groups = out.shape, x.shape[1], alphas.shape[1]
    launch = _launch(config, m, n, k, groups, qweight.shape[2], x.stride(0), x.dtype)
    launch(x, qweight, alphas, offsets, bias, out)


@planned
def _launch(
    config: dict, m: int, n: int, k: int, groups: int, bits: int, stride: int, dtype: torch.dtype
) -> Launch:  # fmt: skip
    bm, bn, warps = (config[name] for name in ("BM", "BN", "num_warps"))
    unit = 4 if groups == 1 else k // groups // WORD
    return Launch(
        _planes_kernel, (cdiv(n, TILE) * (TILE // bn), cdiv(m, bm)), M=m, N=n, K=k, stride_m=stride,
        minus=MINUS[dtype], WIDTH=cdiv(k, WORD), GROUPS=groups, U=unit, BITS=bits, TILE=TILE, BM=bm, BN=bn,
        WARPS=warps, num_warps=warps, maxnreg=config.get("maxnreg"),
    )  # fmt: skip


def sixteen_bits(x: Tensor) -> Tensor:
    """x as the product takes it."""
    x = x if x.dtype in (torch.float16, torch.bfloat16) else x.bfloat16()
    return x if x.stride(-1) == 1 else x.contiguous()
