"""Products of few rows with 4-bit weights in Triton: what counts is reading the weight once.

    y[m, n] = f(a[m] sum_g s[n, g] sum_{k in g} x[m, k] q[n, k]  +  sum_j branch[m, j] U[n, j]  +  b[n])

over groups g of 64 inputs. x are 16-bit floats with a = 1 (weight-only layers: adaLN, time embedding), or codes in
e4m3 or int8 with a scale per row (short inputs of layers with 8-bit activations: nothing is unpacked to memory). x
and q are exact in the 16 bits of the product's operands; sums and scales in float32. Floor in bytes: N K / 2 + N K /
32 for the codes and their scales.

Codes go from memory to the tensor cores through registers alone. In a product of [16, 16] by [16, 8], lane 4 r + t of
a warp holds rows r and r + 8 of the first operand and column r of the second, and of both the same 4 of the 16
inputs; which 4, nobody asks. So lane 4 r + t reads bytes 8 t .. 8 t + 7 of a group of row r, which are its inputs
8 t .. 8 t + 7 and 32 + 8 t .. 39 + 8 t, and the same inputs of row r of x. Reads are numbered along one axis, which
Triton deals to the lanes of a warp, then to the warps, then around again: the warps of a program divide the groups
and meet once, at the end. A word of 8 codes gives two at a time (`svdq_unpack.nibble_pairs`): those of its bytes 0
and 2, or 1 and 3.

With SPLIT > 1 the groups are divided among that many programs; their sums meet in a second kernel in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integers import cdiv
from .launch import Launch, planned
from .nonlinearity import nonlinear
from .svdq_unpack import MAGIC, nibble_pairs

# Of 16 inputs of a product Triton up to 3.7 gives a lane 4 in a row, later versions two pairs 8 apart. Results do not
# depend on it, only whether values have to be handed from lane to lane.
QUADS = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8))


@triton.jit
def _places(BLOCKS: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr):
    """Of every lane's reads, in the order in which Triton deals them out: t, row and group, each [reads]."""
    read = tl.arange(0, BLOCKS * RUN * WARPS * 32)
    t, r = read % 4, read // 4 % 8
    group = read // 32 % WARPS * RUN + read // (32 * WARPS) % RUN
    return t, read // (32 * WARPS * RUN) * 8 + r, group


@triton.jit
def _read(pointers, there, POLICY: tl.constexpr):
    """Zeros where a mask is given and false."""
    if there is None:
        values = tl.load(pointers, eviction_policy=POLICY)
    else:
        values = tl.load(pointers, mask=there, other=0.0, eviction_policy=POLICY)
    return values


@triton.jit
def _read_all(q, wscales, groups, runs, first, end, STEP: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr):
    """(words, scales) of RUNS steps of STEP groups from `first`."""
    words, scales = (), ()
    for i in tl.static_range(RUNS):
        at = first + i * STEP
        words += (_read(q + at * 8, None if EVEN else at + groups < end, "evict_first"),)
        scales += (_read(wscales + at, None if EVEN else at + runs < end, ""),)
    return words, scales


@triton.jit
def _read_half(x, columns, at, end, HALF: tl.constexpr, EVEN: tl.constexpr):
    """The inputs that belong to one half of the codes of a step."""
    return _read(x + at * 64 + 32 * HALF, None if EVEN else at + columns < end, "evict_last")


@triton.jit
def _read_inputs(x, columns, first, end, STEP: tl.constexpr, RUNS: tl.constexpr, EVEN: tl.constexpr):
    """Both halves of the groups of x that belong to them."""
    inputs = ()
    for i in tl.static_range(RUNS):
        at = first + i * STEP
        for half in tl.static_range(2):
            inputs += (_read_half(x, columns, at, end, half, EVEN),)
    return inputs


@triton.jit
def _weights(words, magic, SHIFT: tl.constexpr, dtype: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr):
    """words [reads, 2] -> their codes at SHIFT and SHIFT + 8 [RUN * warps, BN, 32]."""
    byte0, byte2 = nibble_pairs(words, SHIFT, dtype, magic)
    byte1, byte3 = nibble_pairs(words, SHIFT + 8, dtype, magic)
    codes = tl.join(tl.join(byte0, byte2), tl.join(byte1, byte3))
    warps: tl.constexpr = words.shape[0] // (BN * RUN * 4)
    codes = tl.reshape(codes, (BN // 8, RUN, warps, 8, 4, 2, 2, 2))
    codes = tl.permute(codes, (1, 2, 0, 3, 5, 4, 7, 6) if QUADS else (1, 2, 0, 3, 5, 7, 4, 6))
    return tl.reshape(codes, (RUN * warps, BN, 32))


@triton.jit
def _inputs(x, dtype: tl.constexpr, BM: tl.constexpr, RUN: tl.constexpr):
    """x [reads, 8] -> [RUN * warps, 32, BM], inputs in the order of `_weights`."""
    if x.dtype != dtype:
        x = x.to(tl.float32).to(dtype)  # GPUs before Hopper lack e4m3 to bf16
    warps: tl.constexpr = x.shape[0] // (BM * RUN * 4)
    x = tl.reshape(x, (BM // 8, RUN, warps, 8, 4, 2, 2, 2))
    x = tl.permute(x, (1, 2, 5, 4, 7, 6, 0, 3) if QUADS else (1, 2, 5, 7, 4, 6, 0, 3))
    return tl.reshape(x, (RUN * warps, 32, BM))


@triton.jit
def _finish(
    sums, m, n, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK: tl.constexpr, R: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """Scale, add branch and bias to sums [BN, BM], apply f, store."""
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
    sums = nonlinear(sums, NONLINEARITY)
    where = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(where, sums.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _short_kernel(
    x_ptr, row_scale_ptr, q_ptr, wscales_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, part_ptr,
    M, N, GROUPS, stride_m, span, magic,
    RANK: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """Outputs n of a block, rows m of a block, `span` groups; each warp reads RUNS runs of RUN groups at once.

    While they are awaited, the tensor cores multiply for other programs.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    # what is past the last row repeats it, and is not stored
    t, row, group = _places(BN // 8, RUN, WARPS)
    row = tl.minimum(tl.program_id(0) * BN + row, N - 1).to(tl.int64) * GROUPS
    groups = group[:, None]
    q = q_ptr + ((row + group) * 8 + t * 2)[:, None] + tl.arange(0, 2)[None, :]
    t, row, group = _places(BN // 8, 1, WARPS)
    row = tl.minimum(tl.program_id(0) * BN + row, N - 1).to(tl.int64) * GROUPS
    runs = (group * RUN)[:, None] + tl.arange(0, RUN)[None, :]
    wscales = wscales_ptr + row[:, None] + runs  # one for each t, as in the sums
    t, row, group = _places(BM // 8, RUN, WARPS)
    row = tl.minimum(tl.program_id(1) * BM + row, M - 1).to(tl.int64) * stride_m
    columns = group[:, None]
    x = x_ptr + (row + group * 64 + t * 8)[:, None] + tl.arange(0, 8)[None, :]
    start = tl.program_id(2) * span
    end = tl.minimum(start + span, GROUPS)
    sums = tl.zeros((WARPS, BN // 8, 8, BM // 8, 4, 2), tl.float32)
    step: tl.constexpr = WARPS * RUN
    for first in tl.range(start, end, step * RUNS, num_stages=1):
        words, scales = _read_all(q, wscales, groups, runs, first, end, step, RUNS, EVEN)
        if EARLY:
            inputs = _read_inputs(x, columns, first, end, step, RUNS, EVEN)
        tl.debug_barrier()  # lest the compiler move these reads to where they are used: all shall be under way
        for i in tl.static_range(RUNS):
            at = first + i * step
            part = tl.zeros((step, BN, BM), tl.float32)
            for half in tl.static_range(2):
                values = inputs[2 * i + half] if EARLY else _read_half(x, columns, at, end, half, EVEN)
                codes = _weights(words[i], magic, 4 * half, dtype, BN, RUN)
                part = tl.dot(codes, _inputs(values, dtype, BM, RUN), part)
            scale = tl.reshape(scales[i].to(tl.float32), (BN // 8, WARPS, 8, 4, RUN))
            scale = tl.permute(scale, (4, 1, 0, 2, 3))[:, :, :, :, None, :, None]
            sums += tl.sum(tl.reshape(part, (RUN, WARPS, BN // 8, 8, BM // 8, 4, 2)) * scale, 0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = tl.reshape(tl.sum(sums, 0), (BN, BM))
    if SPLIT == 1:
        _finish(sums, m, n, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK, R, NONLINEARITY)
    else:
        where = part_ptr + (tl.program_id(2) * M + m)[None, :].to(tl.int64) * N + n[:, None]
        tl.store(where, sums, mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _meet_kernel(
    part_ptr, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N,
    RANK: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = tl.zeros((BN, BM), tl.float32)
    for part in tl.static_range(SPLIT):
        where = part_ptr + (part * M + m)[None, :].to(tl.int64) * N + n[:, None]
        sums += tl.load(where, mask=(m < M)[None, :] & (n < N)[:, None], other=0.0)
    _finish(sums, m, n, row_scale_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK, R, NONLINEARITY)


def short_product(
    x: Tensor, row_scale: Tensor | None, qweight: Tensor, wscales: Tensor, branch: Tensor | None, up: Tensor | None,
    bias: Tensor | None, out: Tensor, config: dict, nonlinearity: str = "",
) -> None:  # fmt: skip
    """Fill out [M, N] (bf16 or fp16) from x [M, K] of its dtype, or of codes with row_scale float32 [M].

    qweight uint8 [N, K/2] and wscales [N, K/64], contiguous; branch [M, padded rank] and up [N, r] of out's dtype.
    config: SPLIT, BM, BN, RUN, RUNS, EARLY, num_warps; powers of two but for RUNS, BM from 8, BN from 16 on.
    """
    m, n = out.shape
    rank, padded = (0, 0) if up is None else (up.shape[1], branch.shape[1])
    first, meet = _launches(config, m, n, wscales.shape[1], x.stride(0), rank, padded, nonlinearity, out.dtype)
    split = first.grid[2]
    part = out.new_empty(split, m, n, dtype=torch.float32) if split > 1 else out
    branch, up = (out if half is None else half for half in (branch, up))
    first(x, row_scale, qweight.view(torch.int32), wscales, branch, up, bias, out, part)
    if split > 1:
        meet(part, row_scale, branch, up, bias, out)


@planned
def _launches(
    config: dict,
    m: int,
    n: int,
    groups: int,
    stride: int,
    rank: int,
    padded: int,
    nonlinearity: str,
    dtype: torch.dtype,
) -> tuple[Launch, Launch]:
    split, bm, bn, warps = (config[name] for name in ("SPLIT", "BM", "BN", "num_warps"))
    step = warps * config["RUN"] * config["RUNS"]
    split = min(split, cdiv(groups, step))
    grid = (cdiv(n, bn), cdiv(m, bm))
    ends = dict(M=m, N=n, RANK=rank, R=padded, SPLIT=split, BM=bm, BN=bn, NONLINEARITY=nonlinearity, num_warps=warps)
    first = Launch(
        _short_kernel, (*grid, split), GROUPS=groups, stride_m=stride, span=cdiv(cdiv(groups, step), split) * step,
        magic=MAGIC[dtype], RUN=config["RUN"], RUNS=config["RUNS"], WARPS=warps, EVEN=groups % step == 0,
        EARLY=config["EARLY"], **ends,
    )  # fmt: skip
    return first, Launch(_meet_kernel, grid, **ends)
