"""The W4A4 product of SVDQuant in Triton, in the exact semantics of its checkpoints: a scale per group on both sides.

    y[m, n] = f(sum_g a[g, m] s[g, n] sum_{k in g} qx[m, k] qw[n, k]  +  sum_j branch[m, j] U[n, j]  +  b[n])

Codes are whole numbers in e4m3 or int8, their sums over 64 inputs (at most 64 * 8 * 15) exact in both; groups add up
in float32. No tensor core of Hopper multiplies 4-bit codes, so this computes at 8 bits, and each group costs two
operations on every output beside: floor M N K / 32 of them, about as long as the product itself. On Hopper the
one runs under the other (product_w4a4_hopper.py); the kernel here does one after the other, on any GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from ...runtime.settings import multiprocessors
from .tiles import finish, tile_place


@triton.jit
def _operand(desc, ptr, first, k, LIMIT, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows first .. + ROWS, inputs k .. + COLUMNS: by TMA where there is a descriptor."""
    if desc is not None:
        return desc.load([first, k])
    rows = first + tl.arange(0, ROWS)
    where = ptr + rows.to(tl.int64)[:, None] * K + k + tl.arange(0, COLUMNS)[None, :]
    return tl.load(where, mask=(rows < LIMIT)[:, None], other=0.0)


@triton.jit
def _w4a4_kernel(
    a_desc, w_desc, a_ptr, w_ptr, branch_ptr, up_ptr, y_ptr, a_scale_ptr, w_scale_ptr, bias_ptr,
    M, N, K, tiles,
    RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr,
    PROGRAMS: tl.constexpr, NONLINEARITY: tl.constexpr,
):  # fmt: skip
    exact: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        top, left = tile_place(tile, M, N, BM, BN, BAND)
        rows = top + tl.arange(0, BM)
        columns = left + tl.arange(0, BN)
        y = tl.zeros((BM, BN), tl.float32)
        a_scale = tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
        w_scale = tl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)
        for g in range(0, K // 64):
            a = _operand(a_desc, a_ptr, top, g * 64, M, K, BM, 64)
            w = _operand(w_desc, w_ptr, left, g * 64, N, K, BN, 64)
            following = tl.minimum(g + 1, K // 64 - 1)  # its scales arrive under this group's product
            next_a = tl.load(a_scale_ptr + following * M + rows, mask=rows < M, other=0.0)
            next_w = tl.load(w_scale_ptr + following * N + columns, mask=columns < N, other=0.0)
            sums = tl.dot(a, w.T, out_dtype=tl.int32 if exact else tl.float32)
            y += sums.to(tl.float32) * a_scale[:, None] * w_scale[None, :]
            a_scale = next_a
            w_scale = next_w
        finish(y, rows, columns, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK, R, NONLINEARITY)


def product(
    activation: tuple, weight: tuple, up: Tensor | None, bias: Tensor | None, out: Tensor, config: dict,
    nonlinearity: str = "",
) -> None:  # fmt: skip
    """Fill out [M, N] (bf16 or fp16, contiguous) from what `prepare` filled; up [N, r] of out's dtype, contiguous.

    config: TMA, BM, BN, BAND, PER_SM, num_warps, num_stages. Settings with GLUON are of product_w4a4_hopper, for
    e4m3 on Hopper.
    """
    if config.get("GLUON"):
        from . import product_w4a4_hopper  # a Triton without Gluon serves all other settings

        product_w4a4_hopper.product(activation, weight, up, bias, out, config, nonlinearity)
        return
    (codes, a_scale, branch), (w, w_scale) = activation, weight
    rank = 0 if up is None else up.shape[1]
    launch = _launch(config, *codes.shape, out.shape[1], rank, branch.shape[1], nonlinearity, out.device)
    a_moved, w_moved = (codes, w) if config["TMA"] else (None, None)
    launch(a_moved, w_moved, codes, w, branch, out if up is None else up, out, a_scale, w_scale, bias)


@planned
def _launch(
    config: dict, m: int, k: int, n: int, rank: int, r: int, nonlinearity: str, device: torch.device
) -> Launch:
    bm, bn = config["BM"], config["BN"]
    tiles = cdiv(m, bm) * cdiv(n, bn)
    programs = multiprocessors(device) * config["PER_SM"]
    return Launch(
        _w4a4_kernel, (min(programs, tiles),), dict(a_desc=(bm, 64), w_desc=(bn, 64)),
        M=m, N=n, K=k, tiles=tiles, RANK=rank, R=r, BM=bm, BN=bn, BAND=config["BAND"], PROGRAMS=programs,
        NONLINEARITY=nonlinearity, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
