"""The W4A8 product of grouped weights in Triton: whole-number sums of a group, one multiply-add for each output.

    y[m, n] = s_x[m] sum_g s[n, g] P[m, n, g]  +  b[n],    P[m, n, g] = sum_{k in g} q_x[m, k] (q[n, k] - z[n, g])

The operand q - z is an int8 made in registers (words.py with steps of 1), P is an int32 with |P| < 2^22, exact in
float32, where the sums of groups add up. Each group costs two operations on every output beside its product, a
conversion and a multiply-add: floor M N K / 64 of them for groups of 128. As in product_progressive.py the product is
y^T = W x^T. Tiles are smaller, for each output takes two registers, so that programs on one multiprocessor multiply
and scale in turns.

Rows of 8 bits among those of 4 (row_mix.py) are two of 4 bits each, c = 16 h + l with h in [-8, 7], l in [0, 15]:

    y[m, n] = s_x[m] sum_g (16 s[n, g] P_h[m, n, g] + s[n, g] P_l[m, n, g])  +  b[n]

They are stored first, eight high halves and then eight low ones, with scales and offsets of their own in the tables.
So the loop knows nothing of them. At its end both sums of an output lie in the same thread: of 16 rows a product
gives it the i-th and the i + 8-th.
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
def _mixed_place(tile, M, narrow, paired, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """(first row, first stored column): as `tile_place`, where narrow columns begin a tile of their own."""
    wide = tl.cdiv(paired, BN) * BN
    top, left = tile_place(tile, M, wide + narrow, BM, BN, BAND)
    return top, left + tl.where(left < wide, 0, paired - wide)


@triton.jit
def _offset(factors_ptr, g, columns, N):
    """a of a group, int32 [BN, 1, 1]; without zero points the same everywhere."""
    if factors_ptr is None:
        offset = tl.full((columns.shape[0], 1, 1), 120, tl.int32)
    else:
        offset = tl.load(factors_ptr + g * N + columns, mask=columns < N, other=0)[:, None, None] >> 8
    return offset


@triton.jit
def _scaled(y, sums, scales_ptr, g, columns, N):
    scale = tl.load(scales_ptr + g * N + columns, mask=columns < N, other=0.0)
    return y + sums.to(tl.float32) * scale[:, None]


@triton.jit
def _sums(
    x_ptr, w_ptr, factors_ptr, scales_ptr, top, left, M, N, K, groups,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Scaled sums float32 [BN, BM] of a tile; N: stored rows."""
    columns = left + tl.arange(0, BN)
    y = tl.zeros((BN, BM), tl.float32)
    if SIZE == 32:
        for pair in range(tl.cdiv(groups, 2)):
            raw = packed_rows(w_ptr, left, pair, N, K // 2, BN, 1, TMA)
            for half in tl.static_range(2):
                g = tl.minimum(2 * pair + half, groups - 1)  # past the last group inputs are 0
                x = token_rows(x_ptr, top, pair * 64 + 32 * half, M, K, BM, 32, TMA)
                w = tl.reshape(whole(raw, None, _offset(factors_ptr, g, columns, N), half, PACKED), (BN, 32))
                y = _scaled(y, tl.dot(w, x, out_dtype=tl.int32), scales_ptr, g, columns, N)
    else:
        RUNS: tl.constexpr = SIZE // 64
        for g in range(groups):
            raw = packed_rows(w_ptr, left, g * RUNS, N, K // 2, BN, RUNS, TMA)
            x = token_rows(x_ptr, top, g * SIZE, M, K, BM, SIZE, TMA)
            a = _offset(factors_ptr, g, columns, N)
            w = together(whole(raw, None, a, 0, PACKED), whole(raw, None, a, 1, PACKED))
            y = _scaled(y, tl.dot(w, x, out_dtype=tl.int32), scales_ptr, g, columns, N)
    return y


@triton.jit
def _grouped_kernel(
    x_ptr, w_ptr, factors_ptr, scales_ptr, row_scale_ptr, places_ptr, bias_ptr, y_desc, y_ptr,
    M, N, K, groups, wide, paired,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, TMA: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """N: outputs, `wide` of them stored in `paired` rows."""
    if places_ptr is not None:
        top, left = _mixed_place(tl.program_id(0), M, N - wide, paired, BM, BN, BAND)
    else:
        top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
    rows = top + tl.arange(0, BM)
    y = _sums(
        x_ptr, w_ptr, factors_ptr, scales_ptr, top, left, M, N - wide + paired, K, groups, SIZE, BM, BN, TMA, PACKED
    )
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    y *= row_scale[None, :]
    if places_ptr is None:
        stored(y.T, top, left, bias_ptr, y_desc, y_ptr, M, N, BM, BN)
    elif left < paired:
        both = tl.reshape(tl.sum(tl.reshape(y, (BN // 16, 2, 8, BM)), 1), (BN // 2, BM))
        stored_by_index(both, top, left // 2, wide, places_ptr, bias_ptr, y_ptr, M, N, BM, BN // 2)
    else:
        stored_by_index(y, top, left - paired + wide, N, places_ptr, bias_ptr, y_ptr, M, N, BM, BN)


def product(
    tokens: tuple, qweight: Tensor, tables: tuple, places: Tensor | None, bias: Tensor | None, out: Tensor,
    size: int, config: dict, wide: int = 0,
) -> None:  # fmt: skip
    """Fill out [M, N] (float, contiguous).

    tokens: codes int8 [M, K'] and scales float32 [M]; tables: factors int32 [G, N], or None without zero points, and
    scales float32 [G, N], as `tokens_triton.prepare` fills them; qweight uint8 [N, K'/2]; bias [N] or None. size: 32,
    64 or 128 inputs of a group.

    places int32 [N]: outputs that are stored, the `wide` ones first; then qweight and tables have the rows that hold
    these in pairs, and then the narrow ones (row_mix.py).

    config: TMA, BM, BN, BAND, num_warps, num_stages; maxnreg limits registers, PACKED=False widens codes one by one.
    """
    (codes, row_scale), (factors, scales) = tokens, tables
    n = out.shape[1]
    launch = _launch(config, *codes.shape, n, size, scales.shape[0], wide, len(qweight) - n + wide)
    qweight = qweight.view(torch.int8)
    operands = (codes, aligned(qweight)) if config["TMA"] else (codes, qweight)
    stores = config["TMA"] and places is None and n * out.element_size() % 16 == 0
    launch(*operands, factors, scales, row_scale, places, bias, out if stores else None, out)


@planned
def _launch(config: dict, m: int, k: int, n: int, size: int, groups: int, wide: int, paired: int) -> Launch:
    bm, bn = config["BM"], config["BN"]
    blocks = dict(x_ptr=(bm, size), w_ptr=(bn, max(size, 64) // 2), y_desc=(bm, bn)) if config["TMA"] else None
    tiles = cdiv(m, bm) * (cdiv(n - wide, bn) + cdiv(paired, bn))
    return Launch(
        _grouped_kernel, (tiles,), blocks, M=m, N=n, K=k, groups=groups, wide=wide, paired=paired,
        SIZE=size, BM=bm, BN=bn, BAND=config["BAND"], TMA=config["TMA"], PACKED=packed(config, _grouped_kernel),
        num_warps=config["num_warps"], num_stages=config["num_stages"], maxnreg=config.get("maxnreg"),
    )  # fmt: skip
