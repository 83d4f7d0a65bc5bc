"""Products of few rows with 4-bit weights in Triton: what counts is reading the weight once.

    y[m, n] = a[m] sum_k x[m, k] s[n, k // 64] q[n, k]  +  sum_j branch[m, j] U[n, j]  +  b[n]

x are 16-bit floats with a = 1 (weight-only layers: adaLN, time embedding), or codes in e4m3 or int8 with a scale per
row (short inputs of layers with 8-bit activations: nothing is unpacked to memory). Both are exact in the 16 bits of
the product's operands; s q is rounded to them once. Sums in float32. Floor in bytes: N K / 2 + N K / 32 for the codes
and their scales.

With SPLIT > 1 the inputs are divided among that many programs; their sums meet in a second kernel in a fixed order.
A word of 8 codes gives two at a time (`svdq_unpack.nibble_pairs`): those of its bytes 0 and 2, or 1 and 3; the
columns of x are taken apart the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .svdq_unpack import nibble_pairs


@triton.jit
def _pair_product(sums, words, scale, x, SHIFT: tl.constexpr):
    """sums [BN, BM] += the codes at SHIFT and SHIFT + 16 of words [BN, W], times x [BM, 2 W]."""
    first, second = nibble_pairs(words, SHIFT, x.dtype)
    weight = tl.reshape(tl.join(first, second), (words.shape[0], 2 * words.shape[1])) * scale
    return tl.dot(weight, x.T, sums)


@triton.jit
def _taken_apart(x, dtype: tl.constexpr):
    """x [BM, B] -> its even and its odd columns in dtype, by way of float32: GPUs before Hopper lack e4m3 to bf16."""
    return tl.split(tl.reshape(x.to(tl.float32).to(dtype), (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _finish(
    sums, m, n, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Scale, add branch and bias to sums [BN, BM], store."""
    if row_scale_ptr is not None:
        sums *= tl.load(row_scale_ptr + m, mask=m < M, other=0.0)[None, :]
    if R > 0:
        j = tl.arange(0, R)
        there = (n < N)[:, None] & (j < RANK)[None, :]
        up = tl.load(up_ptr + n[:, None] * RANK + j[None, :], mask=there, other=0.0)
        branch = tl.load(branch_ptr + m[None, :] * R + j[:, None], mask=(m < M)[None, :], other=0.0)
        sums = tl.dot(up, branch, sums)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    where = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(where, sums.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _short_kernel(
    x_ptr, row_scale_ptr, q_ptr, wscales_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, part_ptr,
    M, N, GROUPS, stride_m, span,
    RANK: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BYTES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs n of a block, rows m of a block, and `span` bytes of each weight row; q_ptr points to int32."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    start = tl.program_id(2) * span
    end = tl.minimum(start + span, GROUPS * 32)
    sums = tl.zeros((BN, BM), tl.float32)
    for first in tl.range(start, end, BYTES, num_stages=STAGES):
        word = first // 4 + tl.arange(0, BYTES // 4)
        group = first // 32 + tl.arange(0, BYTES // 32)
        byte = first + tl.arange(0, BYTES)
        there = (n < N)[:, None] & (word < GROUPS * 8)[None, :]
        words = tl.load(q_ptr + n.to(tl.int64)[:, None] * (GROUPS * 8) + word[None, :], mask=there, other=0)
        there = (n < N)[:, None] & (group < GROUPS)[None, :]
        scale = tl.load(wscales_ptr + n[:, None] * GROUPS + group[None, :], mask=there, other=0.0).to(dtype)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, BYTES // 32, 16)), (BN, BYTES // 2))
        x = x_ptr + m[:, None] * stride_m + (byte // 32 * 64 + byte % 32)[None, :]
        there = (m < M)[:, None] & (byte < GROUPS * 32)[None, :]
        even, odd = _taken_apart(tl.load(x, mask=there, other=0.0), dtype)
        sums = _pair_product(sums, words, scale, even, 0)
        sums = _pair_product(sums, words, scale, odd, 8)
        even, odd = _taken_apart(tl.load(x + 32, mask=there, other=0.0), dtype)
        sums = _pair_product(sums, words, scale, even, 4)
        sums = _pair_product(sums, words, scale, odd, 12)
    if SPLIT == 1:
        _finish(sums, m, n, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK, R)
    else:
        where = part_ptr + (tl.program_id(2) * M + m)[None, :].to(tl.int64) * N + n[:, None]
        tl.store(where, sums, mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _meet_kernel(
    part_ptr, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N,
    RANK: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = tl.zeros((BN, BM), tl.float32)
    for part in tl.static_range(SPLIT):
        where = part_ptr + (part * M + m)[None, :].to(tl.int64) * N + n[:, None]
        sums += tl.load(where, mask=(m < M)[None, :] & (n < N)[:, None], other=0.0)
    _finish(sums, m, n, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK, R)


def short_product(
    x: Tensor, row_scale: Tensor | None, qweight: Tensor, wscales: Tensor, branch: Tensor | None, up: Tensor | None,
    bias: Tensor | None, out: Tensor, config: dict,
) -> None:  # fmt: skip
    """Fill out [M, N] (bf16 or fp16) from x [M, K] of its dtype, or of codes with row_scale float32 [M].

    qweight uint8 [N, K/2] and wscales [N, K/64], contiguous; branch [M, padded rank] and up [N, r] of out's dtype.
    config: SPLIT, BM, BN, BYTES, STAGES, num_warps.
    """
    (m, k), n = x.shape, len(qweight)
    split, bm, bn, size = (config[name] for name in ("SPLIT", "BM", "BN", "BYTES"))
    split = min(split, triton.cdiv(k // 2, size))
    span = triton.cdiv(triton.cdiv(k // 2, size), split) * size
    rank, padded = (0, 0) if up is None else (up.shape[1], branch.shape[1])
    part = out.new_empty(split, m, n, dtype=torch.float32) if split > 1 else out
    branch, up = (out if half is None else half for half in (branch, up))
    grid = (triton.cdiv(n, bn), triton.cdiv(m, bm))
    ends = dict(RANK=rank, R=padded, SPLIT=split, BM=bm, num_warps=config["num_warps"])
    _short_kernel[(*grid, split)](
        x, row_scale, qweight.view(torch.int32), wscales, branch, up, bias, out, part,
        m, n, k // 64, x.stride(0), span,
        BN=bn, BYTES=size, STAGES=config["STAGES"], **ends,
    )  # fmt: skip
    if split > 1:
        _meet_kernel[grid](part, row_scale, branch, up, bias, out, m, n, BN=bn, **ends)
