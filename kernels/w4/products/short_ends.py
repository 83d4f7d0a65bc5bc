"""Last steps of the products of few rows in Triton: add the sums of all warps, finish, store."""

from __future__ import annotations

import triton
import triton.language as tl

from .nonlinearity import nonlinear


@triton.jit
def meet(sums, BN: tl.constexpr, BM: tl.constexpr):
    """The sums of all warps in a fixed order: [warps, ...] -> [BN, BM]."""
    warps: tl.constexpr = sums.shape[0]
    if warps > 1:
        # a split hands the sums of an output to lanes of one warp: fewer exchanges than a sum over the warps takes
        even, odd = tl.split(tl.reshape(tl.trans(tl.reshape(sums, (warps, BN * BM))), (BN * BM, warps // 2, 2)))
        sums = tl.sum(even + odd, 1)
    return tl.reshape(sums, (BN, BM))


@triton.jit
def read_rows(row_scale_ptr, branch_ptr, m, M, R: tl.constexpr):
    """(row_scale [1, BM], branch [R, BM]); numbers for what is not there."""
    row_scale, branch = 1.0, 0.0
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    if R > 0:
        branch = tl.load(branch_ptr + m[None, :] * R + tl.arange(0, R)[:, None], mask=(m < M)[None, :], other=0.0)
    return row_scale, branch


@triton.jit
def read_ends(up_ptr, bias_ptr, n, N, RANK: tl.constexpr, R: tl.constexpr):
    """(up [BN, R], bias [BN]) of outputs n; numbers for what is not there."""
    up, bias = 0.0, 0.0
    if R > 0:
        j = tl.arange(0, R)
        there = (n < N)[:, None] & (j < RANK)[None, :]
        up = tl.load(up_ptr + n[:, None] * RANK + j[None, :], mask=there, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    return up, bias


@triton.jit
def finish(
    sums, m, n, rows, ends, y_ptr, M, N, R: tl.constexpr, BIAS: tl.constexpr, NONLINEARITY: tl.constexpr
):  # fmt: skip
    """Scale, add branch and bias to sums [BN, BM], apply the nonlinearity, store."""
    sums *= rows[0]
    if R > 0:
        sums = tl.dot(ends[0], rows[1], sums)
    if BIAS:
        sums += ends[1].to(tl.float32)[:, None]
    sums = nonlinear(sums, NONLINEARITY)
    where = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(where, sums.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])
