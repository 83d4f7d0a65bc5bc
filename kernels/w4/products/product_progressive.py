"""The W4A8 product of progressive weights in Triton: int8 tensor cores, 4-bit weights widened in the main loop.

    y[m, n] = f(s_x[m] s0[n] S[m, n]  +  b[n])
    S[m, n] = sum_k q_x[m, k] s1[n, g] (q[n, k] - z[n, g])                          KIND "steps"
            = sum_k q_x[m, k] (q[n, k] + 8)  -  (z[n] + 8) sum_k q_x[m, k]          KIND "rows"
            = sum_k q_x[m, k] t[q[n, k]]                                            KIND "levels"

f is one of nonlinearity.py, or nothing.
"steps": s1 (q - z) is an int8 (words.py), made in registers. "rows": one scale and zero point an output; nibbles are
multiplied as they are, and the zero point is taken off the sum by the sums of tokens, which quantizing them leaves
(tokens_triton.py). "levels": int8 levels of a codebook are looked up in registers (words.py). In all of them the sum
is exact in int32.

The product is taken as y^T = W x^T: the first operand of Hopper's matrix instructions may come from registers, so
widened weights never go to shared memory, and a tile widens each weight once for its BM rows. Triton waits for a
product that reads registers before it makes the next: two programs on a multiprocessor fill each other's waits. Tiles
are stored transposed. Floor in operations: 2 M N K of 8 bits; in bytes: N K / 2 + M K + 2 M N.
Compiled in Gluon and left out, not timed: a product that is still under way while the next nibbles are widened. There
ptxas 13.4 makes every matrix instruction wait for the one before it (its note C7512), with 64 sums a thread, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from .tiles import aligned, stored, tile_place
from .words import as_stored, codebook, looked_up, packed, packed_rows, together, token_rows, whole


@triton.jit
def _factors(factors_ptr, run, half, columns, N, groups, SIZE: tl.constexpr, RUNS: tl.constexpr):
    """(s1, a) of half of runs run .. + RUNS, [BN, RUNS, 1], or [BN, 1, 1] where they are of one group.

    Past the last group, where inputs are 0, those of the last.
    """
    if SIZE >= 64 * RUNS:
        factor = tl.load(factors_ptr + run * 64 // SIZE * N + columns, mask=columns < N, other=0)[:, None, None]
    else:
        g = tl.minimum(((run + tl.arange(0, RUNS)) * 64 + 32 * half) // SIZE, groups - 1)
        where = factors_ptr + g[None, :] * N + columns[:, None]
        factor = tl.load(where, mask=(columns < N)[:, None], other=0)[:, :, None]
    return factor & 255, factor >> 8


@triton.jit
def _progressive_kernel(
    x_ptr, w_ptr, factors_ptr, levels_ptr, row_scale_ptr, row_sum_ptr, column_scale_ptr, bias_ptr, y_desc, y_ptr,
    M, N, K, groups, steps,
    KIND: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr, RUNS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BAND: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr, NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """K: codes of a row in memory, a multiple of 64. SIZE: inputs of a group; 0 for one group a row. STRIDE: words
    from the levels of a row to those of the next."""
    top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
    rows = top + tl.arange(0, BM)
    columns = left + tl.arange(0, BN)
    total = tl.zeros((BN, BM), tl.int32)
    if KIND == "levels":
        levels = codebook(levels_ptr, columns, N, STRIDE)
    elif SIZE == 0:
        factor = tl.load(factors_ptr + columns, mask=columns < N, other=0)[:, None, None]
        s1, a = factor & 255, factor >> 8
    for step in range(steps):
        raw = packed_rows(w_ptr, left, step * RUNS, N, K // 2, BN, RUNS, TMA)
        x = token_rows(x_ptr, top, step * (64 * RUNS), M, K, BM, 64 * RUNS, TMA)
        if KIND == "levels":
            low, high = looked_up(raw, levels, PACKED)
            w = together(low, high)
        elif KIND == "rows":
            w = together(as_stored(raw, 0, PACKED), as_stored(raw, 1, PACKED))
        elif SIZE == 0:
            w = together(whole(raw, s1, a, 0, PACKED), whole(raw, s1, a, 1, PACKED))
        else:
            low, a_low = _factors(factors_ptr, step * RUNS, 0, columns, N, groups, SIZE, RUNS)
            high, a_high = low, a_low
            if SIZE == 32:
                high, a_high = _factors(factors_ptr, step * RUNS, 1, columns, N, groups, SIZE, RUNS)
            w = together(whole(raw, low, a_low, 0, PACKED), whole(raw, high, a_high, 1, PACKED))
        total = tl.dot(w, x, total, out_dtype=tl.int32)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    column_scale = tl.load(column_scale_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    if KIND == "rows":  # a = 128 - (z + 8)
        row_sum = tl.load(row_sum_ptr + rows, mask=rows < M, other=0)
        total -= (128 - tl.reshape(a, (BN, 1))) * row_sum[None, :]
    y = total.to(tl.float32) * (column_scale[:, None] * row_scale[None, :])
    stored(y.T, top, left, bias_ptr, y_desc, y_ptr, M, N, BM, BN, NONLINEARITY)


def product(
    tokens: tuple, qweight: Tensor, factors: Tensor | None, wscales: Tensor, bias: Tensor | None, out: Tensor,
    kind: str, size: int, config: dict, levels: Tensor | None = None, nonlinearity: str = "",
) -> None:  # fmt: skip
    """Fill out [M, N] (float, contiguous).

    tokens: codes int8 [M, K'], scales float32 [M] and, for "rows", sums int32 [M]; factors int32 [G, N], s1 + 256 a:
    as `tokens_triton.prepare` fills them. qweight uint8 [N, K'/2]; wscales [N] float; bias [N] or None. size: inputs
    of a group, 0 for G = 1, as it is for "rows" and "levels", which has no factors: levels int8 [1, 16] or [N, 16],
    contiguous.

    config: TMA, BM, BN, BK (64 or 128), BAND, num_warps, num_stages; maxnreg limits registers, PACKED=False
    widens codes one by one.
    """
    codes, row_scale, row_sum = tokens
    groups, stride = 1 if factors is None else factors.shape[0], 0 if levels is None or len(levels) == 1 else 4
    launch = _launch(config, *codes.shape, out.shape[1], kind, size, groups, stride, nonlinearity)
    qweight = qweight.view(torch.int8)
    operands = (codes, aligned(qweight)) if config["TMA"] else (codes, qweight)
    stores = config["TMA"] and out.shape[1] * out.element_size() % 16 == 0
    words = None if levels is None else levels.view(torch.int32)
    launch(*operands, factors, words, row_scale, row_sum, wscales, bias, out if stores else None, out)


@planned
def _launch(
    config: dict, m: int, k: int, n: int, kind: str, size: int, groups: int, stride: int, nonlinearity: str
) -> Launch:  # fmt: skip
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    blocks = dict(x_ptr=(bm, bk), w_ptr=(bn, bk // 2), y_desc=(bm, bn)) if config["TMA"] else None
    return Launch(
        _progressive_kernel, (cdiv(m, bm) * cdiv(n, bn),), blocks, M=m, N=n, K=k, groups=groups, steps=cdiv(k, bk),
        KIND=kind, STRIDE=stride, SIZE=size, RUNS=bk // 64, BM=bm, BN=bn, BAND=config["BAND"], TMA=config["TMA"],
        PACKED=packed(config, _progressive_kernel), NONLINEARITY=nonlinearity,
        num_warps=config["num_warps"], num_stages=config["num_stages"], maxnreg=config.get("maxnreg"),
    )  # fmt: skip
