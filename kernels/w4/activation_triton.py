"""The activation kernel of SVDQuant in Triton: smooth, quantize and multiply by the branch's first half at once.

    v = (x + c) / s
    token    scale[m] = max_k |v[m, k]| / 448 (e4m3) or / 127 (int8),       q = round(v / scale)
    group    scale[g, m] = max |v| / 7 over 64 inputs, or max v / 15 where c > 0,   q = round(v / scale)
    branch[m, j] = sum_k x[m, k] D[j, k]

x may come in two tensors side by side, and may be normalised first, in the codes and in the branch: norm.py. In the
codes it may be rotated after that, x H in place of x: kernels/runtime/rotation.py.
Divisions are products with reciprocals, of s taken once per layer and of scales once per row, so that a value within
2^-21 of a tie may get the other neighbour than in `svdq.round_activation`. Nothing that is not finite has a code: its
scale is NaN.

Floor in bytes: x once, the codes once. One launch has programs of two kinds. Those that multiply by D stream rows
through the tensor cores; they take longest, so all of them begin first, and no late one is waited for. Those that
quantize hold whole rows in registers, all loads under way at once, and fill the rest. (In one program the two got in
each other's way: 0.8 TB/s.) D is read again by every block of BM rows: r / BM times the size of x, from L2. Codes
stay one byte each, even of 4 bits: they are operands of 8-bit tensor cores, and packing would cost the product its
unpacking in every tile. Measured on an H200 and left out: the branch in parts of K, in turns with the rows
that the cache still holds (7 % faster at K = 12288, slower at 3072 and 15360).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..runtime.rotation import rotated
from ..runtime.rounding import ROUND, to_codes
from .norm import blocks_of, normed, normed_branch, row_statistics, rows_of, starts_of, values_of

INFINITY = tl.constexpr(0x7F800000)  # as bits; |v| as bits orders finite < infinity < NaN


@triton.jit
def _rounded(v, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """v in units of the scale -> codes; those of 4 bits are whole numbers in e4m3 too."""
    if HIGH < 16:
        v = tl.minimum(tl.maximum(v, LOW), HIGH) + ROUND - ROUND
    return to_codes(v, dtype)


@triton.jit
def _scale(bits, HIGH: tl.constexpr):
    """The bits of a maximum of |v| -> its scale: 1 for zeros, NaN for what is not finite."""
    scale = bits.to(tl.float32, bitcast=True) / HIGH
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    return tl.where(bits >= INFINITY, float("nan"), scale)


@triton.jit
def _magnitude(v, UNSIGNED: tl.constexpr):
    if UNSIGNED:
        v = tl.where(v < 0, 0.0, v)
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _inverse_of(x, inverse_ptr, k, K):
    """1 / s in the shape of x: a thread loads what it needs. A vector would change hands through shared memory."""
    return tl.load(tl.broadcast_to(inverse_ptr + k[None, :], x.shape), mask=(k < K)[None, :], other=1.0)


@triton.jit
def _smoothed(x, inverse_ptr, k, K, shift, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr):
    v = x.to(tl.float32)
    if SHIFTED:
        v += shift
    if SMOOTHED:
        v = v * _inverse_of(x, inverse_ptr, k, K)
    return v


@triton.jit
def _plain_branch(
    block, x_ptr, down_ptr, M, K, stride_m, more,
    RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """x D^T of rows block * BM .. + BM, float32 [BM, R].

    A gated x is made in registers: as the first operand of Hopper's matrix instructions it would have each of them
    wait for the one before, so there the product is taken as D x^T.
    """
    m, inside, _ = rows_of(block, M, None, BM)
    ranks, columns = tl.arange(0, R), tl.arange(0, BK)
    x_rows, more_rows = starts_of(x_ptr, stride_m, more, m)
    down_rows = down_ptr + ranks[:, None] * K
    branch = tl.zeros((BM, R), tl.float32) if GATE == "" else tl.zeros((R, BM), tl.float32)
    for first in tl.range(0, K, BK, num_stages=STAGES):
        k = first + columns
        x = values_of(x_rows, more_rows, more, k, inside[:, None] & (k < K)[None, :], GATE)
        down = tl.load(down_rows + k[None, :], mask=(ranks < RANK)[:, None] & (k < K)[None, :], other=0.0)
        down = down.to(x.dtype)
        branch = tl.dot(x, down.T, branch) if GATE == "" else tl.dot(down, x.T, branch)
    return branch if GATE == "" else branch.T


@triton.jit
def _quantized_rows(
    block, x_ptr, inverse_ptr, codes_ptr, scales_ptr, shift, M, K, stride_m, more, norm,
    GROUPED: tl.constexpr, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, GATE: tl.constexpr, turn,
    ONE: tl.constexpr, CENTRED: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """codes and scales of a block of ROWS rows; STEPS * STEP columns hold K."""
    m, there, sample = rows_of(block, M, norm, ROWS)
    inside = there[:, None]
    columns = tl.max_contiguous(tl.arange(0, STEP), 8)  # 16 bytes of x a thread; 16 codes would take every other 16
    x_rows, more_rows = starts_of(x_ptr, stride_m, more, m)
    code_rows = codes_ptr + m.to(tl.int64)[:, None] * K
    code_type: tl.constexpr = codes_ptr.dtype.element_ty
    rows = ()
    for i in tl.static_range(STEPS):
        k = i * STEP + columns
        rows = rows + (values_of(x_rows, more_rows, more, k, inside & (k < K)[None, :], GATE),)
    if norm is not None:
        LATER: tl.constexpr = turn is not None
        mean, rstd = row_statistics(rows, columns, K, norm[5], CENTRED)
        values = ()
        for i in tl.static_range(STEPS):
            k = i * STEP + columns
            v = normed(
                rows[i], mean, rstd, inverse_ptr, shift, norm, sample, k, K, SHIFTED and not LATER,
                SMOOTHED and not LATER, ONE, OFFSET,
            )  # fmt: skip
            values = values + (v,)
        rows = values
    if turn is not None:
        values = ()
        for i in tl.static_range(STEPS):
            values = values + (rotated(rows[i].to(tl.float32), turn),)
        rows = values
    LIFT: tl.constexpr = SHIFTED and (norm is None or turn is not None)
    SMOOTH: tl.constexpr = SMOOTHED and (norm is None or turn is not None)
    if GROUPED:
        for i in tl.static_range(STEPS):
            k = i * STEP + columns
            v = _smoothed(rows[i], inverse_ptr, k, K, shift, LIFT, SMOOTH)
            v = tl.reshape(v, (ROWS, STEP // 64, 64))
            scale = _scale(tl.max(_magnitude(v, SHIFTED), 2), HIGH)
            codes = _rounded(v * (1.0 / scale)[:, :, None], code_type, LOW, HIGH)
            tl.store(code_rows + k[None, :], tl.reshape(codes, (ROWS, STEP)), mask=inside & (k < K)[None, :])
            g = i * (STEP // 64) + tl.arange(0, STEP // 64)
            tl.store(scales_ptr + g[None, :] * M + m[:, None], scale, mask=inside & (g * 64 < K)[None, :])
    else:
        peak = tl.zeros((ROWS, STEP), tl.int32)
        for i in tl.static_range(STEPS):
            k = i * STEP + columns
            v = _smoothed(rows[i], inverse_ptr, k, K, shift, LIFT, SMOOTH)
            if SHIFTED:  # without one, v is 0 beyond K
                v = tl.where((k < K)[None, :], v, 0.0)
            peak = tl.maximum(peak, _magnitude(v, False))
        scale = _scale(tl.max(peak, 1), HIGH)
        tl.store(scales_ptr + m, scale, mask=there)
        inverse = (1.0 / scale)[:, None]
        for i in tl.static_range(STEPS):
            k = i * STEP + columns
            factor = inverse  # on another way than above, or the compiler would keep all v, twice the registers of x
            if SMOOTH:
                factor = _inverse_of(rows[i], inverse_ptr, k, K) * inverse
            v = rows[i].to(tl.float32)
            if LIFT:
                v += shift
            v = v * factor
            tl.store(code_rows + k[None, :], _rounded(v, code_type, LOW, HIGH), mask=inside & (k < K)[None, :])


@triton.jit
def activation_program(
    program, x_ptr, inverse_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m, more, norm,
    RANK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, GATE: tl.constexpr, turn,
    ONE: tl.constexpr, CENTRED: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """First the programs of the branch, of BM rows each, if R > 0 (the rank, padded); then those that quantize.

    more: (pointer, columns of x, stride of rows) or None; with a GATE what x is multiplied by, after that function.
    norm: as in norm.py, or None, with ONE, CENTRED and OFFSET. turn: the matrices of a rotation, or None.
    """
    branches = blocks_of(M, norm, BM) if R > 0 else 0
    if program < branches:
        if R > 0:
            if norm is None:
                branch = _plain_branch(program, x_ptr, down_ptr, M, K, stride_m, more, RANK, R, BM, BK, STAGES, GATE)
            else:
                branch = normed_branch(
                    program, x_ptr, down_ptr, M, K, stride_m, more, norm, RANK, R, BM, BK, STAGES, ONE, CENTRED,
                    OFFSET,
                )  # fmt: skip
            m, inside, _ = rows_of(program, M, norm, BM)
            where = branch_ptr + m[:, None] * R + tl.arange(0, R)[None, :]
            tl.store(where, branch.to(branch_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        _quantized_rows(
            program - branches, x_ptr, inverse_ptr, codes_ptr, scales_ptr, shift, M, K, stride_m, more, norm,
            GROUPED, SHIFTED, SMOOTHED, LOW, HIGH, ROWS, STEP, STEPS, GATE, turn, ONE, CENTRED, OFFSET,
        )  # fmt: skip


@triton.jit
def activation_kernel(
    x_ptr, inverse_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m,
    more_ptr, x_columns, stride_more, gain_ptr, offset_ptr, turn_ptr, stride_gain, stride_offset, sample_rows, eps,
    RANK: tl.constexpr, R: tl.constexpr, GROUPED: tl.constexpr, SHIFTED: tl.constexpr, SMOOTHED: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, ONE: tl.constexpr, CENTRED: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    more = None if more_ptr is None else (more_ptr, x_columns, stride_more)
    norm = (
        None
        if gain_ptr is None
        else (
            gain_ptr, gain_ptr if offset_ptr is None else offset_ptr, stride_gain, stride_offset, sample_rows, eps,
        )
    )  # fmt: skip
    activation_program(
        tl.program_id(0), x_ptr, inverse_ptr, down_ptr, codes_ptr, scales_ptr, branch_ptr, shift, M, K, stride_m,
        more, norm, RANK, R, GROUPED, SHIFTED, SMOOTHED, LOW, HIGH, BM, BK, STAGES, ROWS, STEP, STEPS, GATE, turn_ptr,
        ONE, CENTRED, offset_ptr is not None,
    )  # fmt: skip
