"""The W4A8 product of grouped weights in Triton: whole-number sums of a group, one multiply-add for each output.

    y[m, n] = s_x[m] sum_g s[n, g] P[m, n, g]  +  b[n],    P[m, n, g] = sum_{k in g} q_x[m, k] (q[n, k] - z[n, g])

The operand q - z is an int8 made in registers (words.py with steps of 1), P is an int32 with |P| < 2^22, exact in
float32, where the sums of groups add up. Each group costs two operations on every output beside its product, a
conversion and a multiply-add: floor M N K / 64 of them for groups of 128. As in product_progressive.py the product is
y^T = W x^T. Tiles are smaller, for each output takes two registers, so that programs on one multiprocessor multiply
and scale in turns.

Rows of 8 bits among those of 4 (row_mix.py) are two of 4 bits each, c = 16 h + l with h in [-8, 7], l in [0, 15]:

    y[m, n] = s_x[m] sum_g (16 s[n, g] P_h[m, n, g] + s[n, g] P_l[m, n, g])  +  b[n]

A tile of wide rows goes through its groups twice, first half and second half in turns, in the loop that narrow tiles
have: it costs two of them, and nothing else differs. Wide tiles come first in a band, for they run longest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from .product_progressive import packed
from .tiles import aligned, stored, stored_by_index, tile_place
from .words import packed_rows, together, token_rows, whole


@triton.jit
def _mixed_place(tile, M, N, wide, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """(first row, first stored column, the column behind the last of its width, 1 for a wide tile)."""
    wide_blocks = tl.cdiv(wide, BN)
    width = BAND * (wide_blocks + tl.cdiv(N - wide, BN))
    band = tile // width * BAND
    height = tl.minimum(tl.cdiv(M, BM) - band, BAND)
    block = tile % width // height
    halves = (block < wide_blocks).to(tl.int32)
    left = tl.where(halves == 1, N - wide + block * BN, (block - wide_blocks) * BN)
    return (band + tile % width % height) * BM, left, tl.where(halves == 1, N, N - wide), halves


@triton.jit
def _offset(factors_ptr, g, columns, N):
    """a of a group, int32 [BN, 1, 1]; without zero points the same everywhere."""
    if factors_ptr is None:
        offset = tl.full((columns.shape[0], 1, 1), 120, tl.int32)
    else:
        offset = tl.load(factors_ptr + g * N + columns, mask=columns < N, other=0)[:, None, None] >> 8
    return offset


@triton.jit
def _scaled(y, sums, scales_ptr, g, columns, N, factor, MIXED: tl.constexpr):
    scale = tl.load(scales_ptr + g * N + columns, mask=columns < N, other=0.0)
    if MIXED:
        scale *= factor
    return y + sums.to(tl.float32) * scale[:, None]


@triton.jit
def _sums(
    x_ptr, w_ptr, factors_ptr, scales_ptr, top, left, M, N, K, groups, wide, halves,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Scaled sums float32 [BN, BM] of a tile. MIXED: halves is 1 in a tile of wide rows, whose low halves lie `wide`
    rows below the high ones. Their offset is a row of the table, and no number that is added here: that would keep
    Triton from unpacking where the product reads, in registers."""
    columns = left + tl.arange(0, BN)
    rows = N + wide if MIXED else N
    y = tl.zeros((BN, BM), tl.float32)
    if SIZE == 32:
        pairs = tl.cdiv(groups, 2)
        for i in range(pairs << halves if MIXED else pairs):
            pair, low = (i >> halves, i & halves) if MIXED else (i, 0)
            factor = tl.where(low < halves, 16.0, 1.0) if MIXED else 1.0
            raw = packed_rows(w_ptr, left + low * wide, pair, rows, K // 2, BN, 1, TMA)
            for half in tl.static_range(2):
                g = tl.minimum(2 * pair + half, groups - 1)  # past the last group inputs are 0
                x = token_rows(x_ptr, top, pair * 64 + 32 * half, M, K, BM, 32, TMA)
                a = _offset(factors_ptr, tl.where(low == 1, groups, g) if MIXED else g, columns, N)
                w = tl.reshape(whole(raw, None, a, half, PACKED), (BN, 32))
                y = _scaled(y, tl.dot(w, x, out_dtype=tl.int32), scales_ptr, g, columns, N, factor, MIXED)
    else:
        RUNS: tl.constexpr = SIZE // 64
        for i in range(groups << halves if MIXED else groups):
            g, low = (i >> halves, i & halves) if MIXED else (i, 0)
            factor = tl.where(low < halves, 16.0, 1.0) if MIXED else 1.0
            raw = packed_rows(w_ptr, left + low * wide, g * RUNS, rows, K // 2, BN, RUNS, TMA)
            x = token_rows(x_ptr, top, g * SIZE, M, K, BM, SIZE, TMA)
            a = _offset(factors_ptr, tl.where(low == 1, groups, g) if MIXED else g, columns, N)
            w = together(whole(raw, None, a, 0, PACKED), whole(raw, None, a, 1, PACKED))
            y = _scaled(y, tl.dot(w, x, out_dtype=tl.int32), scales_ptr, g, columns, N, factor, MIXED)
    return y


@triton.jit
def _grouped_kernel(
    x_ptr, w_ptr, factors_ptr, scales_ptr, row_scale_ptr, places_ptr, bias_ptr, y_desc, y_ptr,
    M, N, K, groups, wide,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, TMA: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    MIXED: tl.constexpr = places_ptr is not None
    if MIXED:
        top, left, end, halves = _mixed_place(tl.program_id(0), M, N, wide, BM, BN, BAND)
    else:
        top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
        end, halves = N, 0
    y = _sums(
        x_ptr, w_ptr, factors_ptr, scales_ptr, top, left, M, N, K, groups, wide, halves,
        SIZE, BM, BN, TMA, PACKED, MIXED,
    )  # fmt: skip
    rows = top + tl.arange(0, BM)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    y *= row_scale[None, :]
    if MIXED:
        stored_by_index(y, top, left, end, places_ptr, bias_ptr, y_ptr, M, N, BM, BN)
    else:
        stored(y.T, top, left, bias_ptr, y_desc, y_ptr, M, N, BM, BN)


def product(
    tokens: tuple, qweight: Tensor, tables: tuple, places: Tensor | None, bias: Tensor | None, out: Tensor,
    size: int, config: dict,
) -> None:  # fmt: skip
    """Fill out [M, N] (float, contiguous).

    tokens: codes int8 [M, K'] and scales float32 [M]; tables: factors int32 [G, N], or None without zero points, and
    scales float32 [G, N], as `tokens_triton.prepare` fills them; qweight uint8 [N, K'/2]; bias [N] or None. size: 32,
    64 or 128 inputs of a group.

    places int32 [N]: the output of each stored row; then w = len(qweight) - N of them, the last, have 8 bits,
    qweight holds high halves of all w and then their low halves, and factors are [G + 1, N].

    config: TMA, BM, BN, BAND, num_warps, num_stages; maxnreg limits registers, PACKED=False widens codes one by one.
    """
    (codes, row_scale), (factors, scales) = tokens, tables
    n = out.shape[1]
    launch = _launch(config, *codes.shape, n, size, scales.shape[0], len(qweight) - n)
    qweight = qweight.view(torch.int8)
    operands = (codes, aligned(qweight)) if config["TMA"] else (codes, qweight)
    stores = config["TMA"] and places is None and n * out.element_size() % 16 == 0
    launch(*operands, factors, scales, row_scale, places, bias, out if stores else None, out)


@planned
def _launch(config: dict, m: int, k: int, n: int, size: int, groups: int, wide: int) -> Launch:
    bm, bn = config["BM"], config["BN"]
    blocks = dict(x_ptr=(bm, size), w_ptr=(bn, max(size, 64) // 2), y_desc=(bm, bn)) if config["TMA"] else None
    tiles = cdiv(m, bm) * (cdiv(n - wide, bn) + cdiv(wide, bn))
    return Launch(
        _grouped_kernel, (tiles,), blocks, M=m, N=n, K=k, groups=groups, wide=wide,
        SIZE=size, BM=bm, BN=bn, BAND=config["BAND"], TMA=config["TMA"], PACKED=packed(config, _grouped_kernel),
        num_warps=config["num_warps"], num_stages=config["num_stages"], maxnreg=config.get("maxnreg"),
    )  # fmt: skip
