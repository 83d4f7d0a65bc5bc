"""Products of few rows with 4-bit weights in Triton: what counts is reading the weight once.

    y[m, n] = a[m] sum_g s[n, g] (sum_{k in g} x[m, k] (q[n, k] + c) - c sum_{k in g} x[m, k])
              + sum_j branch[m, j] U[n, j]  +  b[n]

over groups g of 64 inputs. x are 16-bit floats with a = 1 (weight-only layers: adaLN, time embedding), or codes in
e4m3 or int8 with a scale per row (short inputs of layers with 8-bit activations: nothing is unpacked to memory). x
and q + c are exact in the 16 bits of the product's operands; sums and scales in float32. Floor in bytes: N K / 2 +
N K / 32 for the codes and their scales.

q + c is what unpacking gives soonest (w4a16_operands.py). The sum of x, which takes c away again, does not depend on
n: a program works it out once, for all its outputs. What that adds to rounding errors, of the order of 2^-24 c |x|,
is far less than 16 bits of an output show.

The warps of a program divide the groups among them, so that each keeps its part of x in registers while the program
walks over blocks of outputs; they meet once a block. As soon as a warp has multiplied a run of groups, it reads the
same run AHEAD blocks on, so that memory need not wait for the tensor cores. If registers cannot hold all of K, SPLIT
programs divide it; their sums meet in a second kernel in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .integers import cdiv
from .launch import Launch, planned
from .svdq_gemm import multiprocessors
from .w4a16_ends import finish, meet, read_ends, read_rows
from .w4a16_operands import MAGIC, excess_of, places, read_inputs, read_run, scales_of, weights
from .w4a16_streaming import streaming_launch


@triton.jit
def _short_kernel(
    x_ptr, row_scale_ptr, q_ptr, wscales_ptr, branch_ptr, up_ptr, bias_ptr, y_ptr, part_ptr,
    M, N, GROUPS, stride_m, magic,
    RANK: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """Rows m of a block, RUNS runs of RUN groups for each warp, and every so many blocks of BN outputs one."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    step: tl.constexpr = WARPS * RUN
    start = tl.program_id(2) * step * RUNS
    end = GROUPS - start
    programs = tl.num_programs(0)
    t, row, group = places(BN // 8, RUN, WARPS)
    row, groups = row[:, None], group[:, None]
    q = (row * GROUPS + groups + start) * 8 + t[:, None] * 2 + tl.arange(0, 2)[None, :]
    t, rows, runs = places(BN // 8, 1, WARPS)
    runs *= RUN
    at = rows * GROUPS + runs + start  # one for each t, as in the sums
    wscales, pairs_ptr = at >> 1, wscales_ptr.to(tl.pointer_type(tl.int32))
    words, scales = (), ()
    for j in tl.static_range(AHEAD):
        block = tl.program_id(0) + j * programs
        q_of = q_ptr + (q + block * (BN * GROUPS * 8))
        wscales_of = pairs_ptr + (wscales + block * (BN * GROUPS // 2))
        for i in tl.static_range(RUNS):
            read = read_run(q_of, wscales_of, row, groups, rows, runs, i * step, N - block * BN, end, EVEN)
            words += (read[0],)
            scales += (read[1],)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    ends_of_rows = read_rows(row_scale_ptr, branch_ptr, m, M, R)
    ends = read_ends(up_ptr, bias_ptr, tl.program_id(0) * BN + tl.arange(0, BN), N, RANK, R)
    if bias_ptr is not None and SPLIT == 1:  # into the L2 cache, whence the blocks have it in time
        coming = (tl.program_id(0) + tl.arange(0, 64) * programs) * BN
        tl.load(bias_ptr + coming, mask=coming < N, volatile=True)
    t, row_x, columns = places(BM // 8, RUN, WARPS)
    row_x = tl.minimum(tl.program_id(1) * BM + row_x, M - 1)  # past the last row it repeats, and is not stored
    x = x_ptr + (row_x.to(tl.int64) * stride_m + (columns + start) * 64 + t * 8)[:, None] + tl.arange(0, 8)[None, :]
    inputs = read_inputs(x, columns[:, None], end, dtype, step, RUNS, BM, RUN, EVEN)
    excess = excess_of(inputs, dtype, BN, RUNS)
    for first in tl.range(tl.program_id(0), tl.cdiv(N, BN), programs * AHEAD, num_stages=1):
        for j in tl.static_range(AHEAD):  # those of the same j have their registers
            block = first + j * programs
            later = block + AHEAD * programs
            q_of = q_ptr + (q + later * (BN * GROUPS * 8))
            wscales_of = pairs_ptr + (wscales + later * (BN * GROUPS // 2))
            sums = tl.zeros((WARPS, BN // 8, 8, BM // 8, 4, 2), tl.float32)
            for i in tl.static_range(RUNS):
                part = tl.zeros((step, BN, BM), tl.float32)
                for half in tl.static_range(2):
                    part = tl.dot(weights(words[0], magic, 4 * half, dtype, BN, RUN), inputs[2 * i + half], part)
                scale = scales_of(scales[0], at, wscales_ptr.dtype.element_ty, BN, RUN, WARPS)
                sums += tl.sum(tl.reshape(part + excess[i], (RUN, WARPS, BN // 8, 8, BM // 8, 4, 2)) * scale, 0)
                read = read_run(q_of, wscales_of, row, groups, rows, runs, i * step, N - later * BN, end, EVEN)
                words = words[1:] + (read[0],)
                scales = scales[1:] + (read[1],)
            sums = meet(sums, BN, BM)
            n = block * BN + tl.arange(0, BN)
            if SPLIT == 1:
                finish(sums, m, n, ends_of_rows, ends, y_ptr, M, N, R, bias_ptr is not None, NONLINEARITY)
            else:
                where = part_ptr + (tl.program_id(2) * M + m)[None, :].to(tl.int64) * N + n[:, None]
                tl.store(where, sums, mask=(m < M)[None, :] & (n < N)[:, None])
            ends = read_ends(up_ptr, bias_ptr, (block + programs) * BN + tl.arange(0, BN), N, RANK, R)


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
    rows = read_rows(row_scale_ptr, branch_ptr, m, M, R)
    ends = read_ends(up_ptr, bias_ptr, n, N, RANK, R)
    finish(sums, m, n, rows, ends, y_ptr, M, N, R, bias_ptr is not None, NONLINEARITY)


def short_product(
    x: Tensor, row_scale: Tensor | None, qweight: Tensor, wscales: Tensor, branch: Tensor | None, up: Tensor | None,
    bias: Tensor | None, out: Tensor, config: dict, nonlinearity: str = "",
) -> None:  # fmt: skip
    """Fill out [M, N] (bf16 or fp16) from x [M, K] of its dtype, or of codes with row_scale float32 [M].

    qweight uint8 [N, K/2] and wscales [N, K/64], contiguous, N K below 2^34; branch [M, padded rank] and up [N, r]
    of out's dtype. config: RUNS, how many runs of RUN (1 or 2) groups of x a warp may hold; SPLIT, how many programs
    divide K at least; BM from 8, BN from 16 on and num_warps from 2 on, powers of two; AHEAD; PER_SM, programs for
    each multiprocessor. Settings with STREAMING are of w4a16_streaming.py: BM, BN, AHEAD, num_warps from 1 on.
    """
    (m, n), groups = out.shape, wscales.shape[1]
    rank, padded = (0, 0) if up is None else (up.shape[1], branch.shape[1])
    if wscales.data_ptr() % 4 or wscales.numel() % 2:  # they are read in twos
        wscales = F.pad(wscales.flatten(), (0, 1))
    branch, up = (out if half is None else half for half in (branch, up))
    operands = x, row_scale, qweight.view(torch.int32), wscales, branch, up, bias, out
    sizes = m, n, groups, x.stride(0), rank, padded, nonlinearity, out.dtype
    if config.get("STREAMING"):
        streaming_launch(config, *sizes)(*operands)
        return
    first, meet = _launches(config, *sizes, out.device)
    split = first.grid[2]
    part = out.new_empty(split, m, n, dtype=torch.float32) if split > 1 else out
    first(*operands, part)
    if split > 1:
        meet(part, row_scale, branch, up, bias, out)


@planned
def _launches(
    config: dict, m: int, n: int, groups: int, stride: int, rank: int, padded: int, nonlinearity: str,
    dtype: torch.dtype, device: torch.device,
) -> tuple[Launch, Launch]:  # fmt: skip
    bm, bn, warps = (config[name] for name in ("BM", "BN", "num_warps"))
    run = config["RUN"] if groups % config["RUN"] == 0 else 1
    rounds = cdiv(groups, warps * run)
    runs = cdiv(rounds, min(rounds, max(config["SPLIT"], cdiv(rounds, config["RUNS"]))))
    split = cdiv(rounds, runs)
    blocks = (cdiv(n, bn), cdiv(m, bm))
    programs = min(blocks[0], max(1, config["PER_SM"] * multiprocessors(device) // (blocks[1] * split)))
    ends = dict(M=m, N=n, RANK=rank, R=padded, SPLIT=split, BM=bm, BN=bn, NONLINEARITY=nonlinearity, num_warps=warps)
    first = Launch(
        _short_kernel, (programs, blocks[1], split), GROUPS=groups, stride_m=stride, magic=MAGIC[dtype],
        RUN=run, RUNS=runs, WARPS=warps, EVEN=groups == warps * run * runs * split, AHEAD=config["AHEAD"], **ends,
    )  # fmt: skip
    return first, Launch(_meet_kernel, blocks, **ends)
