"""The W4A8 product of grouped weights in Triton: whole-number sums of a group, one multiply-add for each output.

    y[m, n] = s_x[m] sum_g s[n, g] P[m, n, g]  +  b[n],    P[m, n, g] = sum_{k in g} q_x[m, k] (q[n, k] - z[n, g])

The operand q - z is an int8 made in registers (words.py with steps of 1), P is an int32 with |P| < 2^22, exact in
float32, where the sums of groups add up. Each group costs two operations on every output beside its product, a
conversion and a multiply-add: floor M N K / 64 of them for groups of 128. As in product_progressive.py the product is
y^T = W x^T. Tiles are smaller, for each output takes two registers, so that programs on one multiprocessor multiply
and scale in turns. On an H200 loads, unpacking, products and scaling together take 0.4 of what they take one after
the other, and scaling alone 0.8 of it (scripts/benchmarks/bench_overlap.py).

Of a codebook the operand is t[q], looked up in registers (words.py): |P| <= 128 * 127 * 127 < 2^22.

Rows of 8 bits among those of 4 (row_mix.py) are two of 4 bits each, c = 16 h + l with h in [-8, 7], l in [0, 15]:

    y[m, n] = s_x[m] (sum_g s[n, g] P_l[m, n, g]  +  H[m, n])  +  b[n],    H[m, n] = sum_g 16 s[n, g] P_h[m, n, g]

High halves are rows of their own, before all others, with scales and offsets of their own in the tables, so that the
loop knows nothing of them. Their tiles leave H in memory and count themselves. The others have outputs in order, and
are stored as tiles of one width are; at its end one that has wide outputs waits for that count, and adds H. Tiles of
high halves come first in each band: programs start in the order of their numbers, so that none waits for one that
cannot start (as where CUTLASS splits K). PARTS of H, over a part of K each, are tiles of their own, and are added in
order: the same sum every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from .tiles import aligned, stored, tile_place
from .words import codebook, looked_up, packed, packed_rows, together, token_rows, whole


@triton.jit
def _of_group(table_ptr, g, columns, N, width, BEYOND: tl.constexpr):
    """[BN] of a table; BEYOND: it goes on past the last row, for a mask costs each step instructions."""
    if BEYOND:
        found = tl.load(table_ptr + g * width + columns)
    else:
        found = tl.load(table_ptr + g * width + columns, mask=columns < N, other=0)
    return found


@triton.jit
def _offset(factors_ptr, g, columns, N, width, BEYOND: tl.constexpr):
    """a of a group, int32 [BN, 1, 1]; without zero points the same everywhere."""
    if factors_ptr is None:
        offset = tl.full((columns.shape[0], 1, 1), 120, tl.int32)
    else:
        offset = _of_group(factors_ptr, g, columns, N, width, BEYOND)[:, None, None] >> 8
    return offset


@triton.jit
def _scaled(y, sums, scales_ptr, g, columns, N, width, BEYOND: tl.constexpr):
    return y + sums.to(tl.float32) * _of_group(scales_ptr, g, columns, N, width, BEYOND)[:, None]


@triton.jit
def _sums(
    x_ptr, w_ptr, factors_ptr, scales_ptr, levels_ptr, top, left, M, N, K, groups, width, first, last,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    PACKED: tl.constexpr, BEYOND: tl.constexpr,
):  # fmt: skip
    """Scaled sums float32 [BN, BM] of a tile, over steps first .. last: groups, or pairs of 32; N: stored rows;
    width: of a table."""
    columns = left + tl.arange(0, BN)
    y = tl.zeros((BN, BM), tl.float32)
    if levels_ptr is not None:
        levels = codebook(levels_ptr, columns, N, STRIDE)
    if SIZE == 32:
        for pair in range(first, last):
            raw = packed_rows(w_ptr, left, pair, N, K // 2, BN, 1, TMA)
            if levels_ptr is not None:
                low, high = looked_up(raw, levels, PACKED)
            for half in tl.static_range(2):
                g = tl.minimum(2 * pair + half, groups - 1)  # past the last group inputs are 0
                x = token_rows(x_ptr, top, pair * 64 + 32 * half, M, K, BM, 32, TMA)
                if levels_ptr is None:
                    a = _offset(factors_ptr, g, columns, N, width, BEYOND)
                    w = tl.reshape(whole(raw, None, a, half, PACKED), (BN, 32))
                elif half == 0:
                    w = tl.reshape(low, (BN, 32))
                else:
                    w = tl.reshape(high, (BN, 32))
                y = _scaled(y, tl.dot(w, x, out_dtype=tl.int32), scales_ptr, g, columns, N, width, BEYOND)
    else:
        RUNS: tl.constexpr = SIZE // 64
        for g in range(first, last):
            raw = packed_rows(w_ptr, left, g * RUNS, N, K // 2, BN, RUNS, TMA)
            x = token_rows(x_ptr, top, g * SIZE, M, K, BM, SIZE, TMA)
            if levels_ptr is None:
                a = _offset(factors_ptr, g, columns, N, width, BEYOND)
                w = together(whole(raw, None, a, 0, PACKED), whole(raw, None, a, 1, PACKED))
            else:
                low, high = looked_up(raw, levels, PACKED)
                w = together(low, high)
            y = _scaled(y, tl.dot(w, x, out_dtype=tl.int32), scales_ptr, g, columns, N, width, BEYOND)
    return y


@triton.jit
def _slots_of(slots_ptr, left, N, BN: tl.constexpr):
    """(first, end): rows of high halves that belong to outputs left .. + BN, which lie one after the other."""
    last = tl.load(slots_ptr + tl.minimum(left + BN, N) - 1)
    return tl.load(slots_ptr + left) >> 1, (last >> 1) + (last & 1)


@triton.jit
def _first_bits(x, EXACT: tl.constexpr):
    """(the first 8 bits of float32 x in bfloat16, what is left of x); all bits if EXACT is float32."""
    if tl.float32 == EXACT:
        some, rest = x, tl.zeros_like(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        some = (bits >> 16).to(tl.int16).to(EXACT, bitcast=True)
        rest = x - (bits & -65536).to(tl.float32, bitcast=True)
    return some, rest


@triton.jit
def _with_highs(
    y, slots_ptr, ready_ptr, highs_ptr, begin, end, ready, left, rows, tiles, N, high, stride,
    PARTS: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y [BN, BM] of outputs from `left` on, and sums of their high halves, once so many `tiles` have left them.

    A product with ones and zeros puts these sums where they belong, in registers as y is: in three parts of bfloat16,
    that hold all bits of a float32.
    """
    EXACT: tl.constexpr = tl.bfloat16 if PACKED else tl.float32  # which Triton's interpreter multiplies
    columns = left + tl.arange(0, BN)
    while ready < tiles:
        ready = tl.atomic_add(ready_ptr, 0, sem="acquire")
    tl.debug_barrier()
    j = tl.arange(0, 16)
    for first in tl.range(begin, end, 16, num_stages=1):
        row = tl.minimum(first + j, high - 1)  # what is not of this tile is finite, and goes nowhere
        sums = tl.zeros((16, rows.shape[0]), tl.float32)
        for part in tl.static_range(PARTS):
            where = highs_ptr + (part * high + row).to(tl.int64)[:, None] * stride + rows[None, :]
            sums += tl.load(where, cache_modifier=".cg")
        slots = tl.load(slots_ptr + columns, mask=columns < N, other=0)
        ones = (slots[:, None] == 2 * (first + j[None, :]) + 1).to(EXACT)
        placed = tl.zeros(y.shape, tl.float32)
        for _ in tl.static_range(3):
            some, sums = _first_bits(sums, EXACT)
            placed = tl.dot(ones, some, placed, input_precision="ieee")
        y += placed
    return y


@triton.jit(do_not_specialize=["parts"])
def _grouped_kernel(
    x_ptr, w_ptr, factors_ptr, scales_ptr, levels_ptr, row_scale_ptr, slots_ptr, ready_ptr, highs_ptr, bias_ptr,
    y_desc, y_ptr,
    M, N, K, groups, width, high, stored_rows, stride, parts,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """N: outputs; `high` rows of high halves lie before theirs, whose sums have rows of `stride`.

    parts is PARTS, and not known beforehand: else 314 instructions of the loop, on Hopper, were 318.
    """
    steps = tl.cdiv(groups, 2) if SIZE == 32 else groups
    if slots_ptr is None:
        top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
        y = _sums(
            x_ptr, w_ptr, factors_ptr, scales_ptr, levels_ptr, top, left, M, N, K, groups, width, 0, steps,
            SIZE, STRIDE, BM, BN, TMA, PACKED, False,
        )  # fmt: skip
    else:
        blocks = tl.cdiv(high, BN)
        top, left = tile_place(tl.program_id(0), M, blocks * PARTS * BN + N, BM, BN, BAND)
        part = left // BN // blocks
        is_high = part < PARTS
        left -= tl.minimum(part, PARTS) * blocks * BN  # the first row of a tile among rows of its kind
        first, last = 0, steps
        if is_high:
            length = tl.cdiv(steps, parts)
            first = part * length
            last = tl.minimum(first + length, steps)
        begin, end, ready = 0, 0, 0
        if not is_high:
            begin, end = _slots_of(slots_ptr, left, N, BN)
            if end > begin:  # most often they are there by now, and nothing need be asked at the end
                ready = tl.atomic_add(ready_ptr + top // BM, 0, sem="acquire")
        row = tl.where(is_high, left, high + left)
        y = _sums(
            x_ptr, w_ptr, factors_ptr, scales_ptr, None, top, row, M, stored_rows, K, groups, width, first, last,
            SIZE, STRIDE, BM, BN, TMA, PACKED, True,
        )  # fmt: skip
    rows = top + tl.arange(0, BM)
    columns = left + tl.arange(0, BN)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    if slots_ptr is None:
        stored((y * row_scale[None, :]).T, top, left, bias_ptr, y_desc, y_ptr, M, N, BM, BN, "")
    elif is_high:
        where = highs_ptr + (part * high + columns).to(tl.int64)[:, None] * stride + rows[None, :]
        tl.store(where, y, mask=(columns < high)[:, None])
        tl.debug_barrier()  # all of the program has stored before one thread says so
        tl.atomic_add(ready_ptr + top // BM, 1, sem="release")
    else:
        if end > begin:
            y = _with_highs(
                y, slots_ptr, ready_ptr + top // BM, highs_ptr, begin, end, ready, left, rows, blocks * PARTS, N,
                high, stride, PARTS, BN, PACKED,
            )  # fmt: skip
        stored((y * row_scale[None, :]).T, top, left, bias_ptr, y_desc, y_ptr, M, N, BM, BN, "")


def product(
    tokens: tuple, qweight: Tensor, tables: tuple, bias: Tensor | None, out: Tensor, size: int, config: dict,
    wide: tuple = (None, None, None), levels: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill out [M, N] (float, contiguous).

    tokens: codes int8 [M, K'] and scales float32 [M]; tables: factors int32 [G, N], or None without zero points, and
    scales float32 [G, N], as `tokens_triton.prepare` fills them; qweight uint8 [N, K'/2]; bias [N] or None. size: 32,
    64 or 128 inputs of a group. levels: int8 [1, 16] or [N, 16] of a codebook, contiguous; then factors and wide are
    None.

    wide: of rows of two widths (slots int32 [N]: twice the number of wide outputs before each, and 1 more where it is
    one; counts of zero; room for sums of high halves float32 [parts, rows, >= M]). Then qweight and tables have these
    rows before the N. Rows of tables and of this room are so long that all tiles end in them: `integer.table_width`.

    config: TMA, BM, BN, BAND, num_warps, num_stages; maxnreg limits registers, PACKED=False widens codes one by one.
    """
    (codes, row_scale), (factors, scales) = tokens, tables
    slots, ready, sums = wide
    n = out.shape[1]
    high = (0, 0, 0) if sums is None else tuple(sums.shape)
    apart = 0 if levels is None or len(levels) == 1 else 4
    launch = _launch(config, *codes.shape, n, size, tuple(scales.shape), high, apart)
    qweight = qweight.view(torch.int8)
    operands = (codes, aligned(qweight)) if config["TMA"] else (codes, qweight)
    stores = config["TMA"] and n * out.element_size() % 16 == 0
    words = None if levels is None else levels.view(torch.int32)
    launch(*operands, factors, scales, words, row_scale, slots, ready, sums, bias, out if stores else None, out)


@planned
def _launch(config: dict, m: int, k: int, n: int, size: int, tables: tuple, highs: tuple, words: int) -> Launch:
    bm, bn, (groups, width), (parts, high, stride) = config["BM"], config["BN"], tables, highs
    blocks = dict(x_ptr=(bm, size), w_ptr=(bn, max(size, 64) // 2), y_desc=(bm, bn)) if config["TMA"] else None
    return Launch(
        _grouped_kernel, (cdiv(m, bm) * (parts * cdiv(high, bn) + cdiv(n, bn)),), blocks,
        M=m, N=n, K=k, groups=groups, width=width, high=high, stored_rows=high + n, stride=stride, parts=parts,
        PARTS=parts, SIZE=size, STRIDE=words, BM=bm, BN=bn, BAND=config["BAND"], TMA=config["TMA"],
        PACKED=packed(config, _grouped_kernel), num_warps=config["num_warps"], num_stages=config["num_stages"],
        maxnreg=config.get("maxnreg"),
    )  # fmt: skip
