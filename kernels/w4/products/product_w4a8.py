"""The W4A8 product of SVDQuant in Triton: 8-bit operands, the low-rank branch on the same accumulator, one store.

    y[m, n] = f(a[m] c[n] sum_k qx[m, k] w8[n, k]  +  sum_j branch[m, j] U[n, j]  +  b[n])

f is one of nonlinearity.py, or nothing. qx, a and branch come from activation.py, w8 and c from unpack.py.
Codes are e4m3 (sums in float32) or int8 (sums in int32, exact). Floor in operations: 2 M N (K at 8 bits + r at 16).

On Hopper product_w4a8_hopper.py is faster. Here, from Hopper on, operands move by TMA, and as many programs
as multiprocessors walk over the tiles, so that the loads of the next tile begin under the epilogue of this one.
Elsewhere each tile is a program with loads by pointers.
Tried on an H200 and left out, for no gain: cutting the tiles of a last, half-empty wave in two; launching this kernel
before the one that quantizes has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from ...runtime.settings import multiprocessors
from .nonlinearity import nonlinear
from .tiles import aligned, finish, tile_place


@triton.jit
def _tma_tile(
    top, left, a_desc, w_desc, branch_desc, up_desc, y_desc, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr,
    M, N, K, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    exact: tl.constexpr = a_desc.dtype == tl.int8
    rows = top + tl.arange(0, BM)
    columns = left + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.int32 if exact else tl.float32)
    for k in range(0, K, BK):
        sums = tl.dot(a_desc.load([top, k]), w_desc.load([left, k]).T, sums, out_dtype=sums.dtype)
    # One after the other, the waits would add up: what comes by pointers is under way while the branch is waited for.
    # The branch comes by TMA. By pointers, ptxas would make every product of the main loop wait for the one before it
    # (its note C7515); a loop here keeps Triton from loading across tiles, which only ranks above 32 pay.
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    column_scale = tl.load(column_scale_ptr + columns, mask=columns < N, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
    if R > 0 and R <= 32:
        branch = branch_desc.load([top, 0])
        up = up_desc.load([left, 0])
    y = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    if R > 0 and R <= 32:
        y = tl.dot(branch, up.T, y)
    elif R > 0:
        for first in tl.range(0, R, 32, num_stages=1):  # unrolled, they would take shared memory side by side
            y = tl.dot(branch_desc.load([top, first]), up_desc.load([left, first]).T, y)
    if bias_ptr is not None:
        y += bias.to(tl.float32)[None, :]
    y = nonlinear(y, NONLINEARITY)
    if y_desc is None:
        where = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
    elif PIECES == 1:
        y_desc.store([top, left], y.to(y_desc.dtype))
    else:  # half of the shared memory that the whole tile would take
        first, second = tl.split(tl.permute(tl.reshape(y, (BM, 2, BN // 2)), (0, 2, 1)))
        y_desc.store([top, left], first.to(y_desc.dtype))
        y_desc.store([top, left + BN // 2], second.to(y_desc.dtype))


@triton.jit
def _tma_kernel(
    a_desc, w_desc, branch_desc, up_desc, y_desc, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, M, N, K, tiles,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    PROGRAMS: tl.constexpr, PIECES: tl.constexpr, NONLINEARITY: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        top, left = tile_place(tile, M, N, BM, BN, BAND)
        _tma_tile(
            top, left, a_desc, w_desc, branch_desc, up_desc, y_desc, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr,
            M, N, K, R, BM, BN, BK, PIECES, NONLINEARITY,
        )  # fmt: skip


@triton.jit
def _pointer_kernel(
    a_ptr, w_ptr, branch_ptr, up_ptr, y_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, M, N, K,
    RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    top, left = tile_place(tl.program_id(0), M, N, BM, BN, BAND)
    rows = top + tl.arange(0, BM)
    columns = left + tl.arange(0, BN)
    k = tl.arange(0, BK)
    exact: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    sums = tl.zeros((BM, BN), tl.int32 if exact else tl.float32)
    a = a_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
    w = w_ptr + columns.to(tl.int64)[None, :] * K + k[:, None]
    for first in range(0, K, BK):
        inside = first + k < K
        a_tile = tl.load(a + first, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        w_tile = tl.load(w + first, mask=(columns < N)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(a_tile, w_tile, sums, out_dtype=sums.dtype)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    column_scale = tl.load(column_scale_ptr + columns, mask=columns < N, other=0.0)
    y = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
    finish(y, rows, columns, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK, R, NONLINEARITY)


def product(
    activation: tuple, weight: tuple, up: Tensor | None, bias: Tensor | None, out: Tensor, config: dict,
    nonlinearity: str = "",
) -> None:  # fmt: skip
    """Fill out [M, N] (bf16 or fp16, contiguous) from what `prepare` filled; up [N, r] of out's dtype, contiguous.

    config: TMA, BM, BN, BK, BAND, num_warps, num_stages; with TMA also PIECES (stores of a tile) and PER_SM (programs
    of a multiprocessor). Settings with GLUON are of product_w4a8_hopper, on Hopper.
    """
    if config.get("GLUON"):
        from . import product_w4a8_hopper  # a Triton without Gluon serves all other settings

        kernel = product_w4a8_hopper.product
    else:
        kernel = _tma_product if config["TMA"] else _pointer_product
    kernel(activation, weight, up, bias, out, config, nonlinearity)


def _pointer_product(activation, weight, up, bias, out, config, nonlinearity) -> None:
    (codes, row_scale, branch), (w8, column_scale) = activation, weight
    rank = 0 if up is None else up.shape[1]
    launch = _pointer_launch(config, *codes.shape, out.shape[1], rank, branch.shape[1], nonlinearity)
    launch(codes, w8, branch, out if up is None else up, out, row_scale, column_scale, bias)


@planned
def _pointer_launch(config: dict, m: int, k: int, n: int, rank: int, r: int, nonlinearity: str) -> Launch:
    sizes = {name: config[name] for name in ("BM", "BN", "BK", "BAND", "num_warps", "num_stages")}
    tiles = cdiv(m, config["BM"]) * cdiv(n, config["BN"])
    return Launch(_pointer_kernel, (tiles,), M=m, N=n, K=k, RANK=rank, R=r, NONLINEARITY=nonlinearity, **sizes)


def _tma_product(activation, weight, up, bias, out, config, nonlinearity) -> None:
    (codes, row_scale, branch), (w8, column_scale) = activation, weight
    (m, k), n, r = codes.shape, out.shape[1], branch.shape[1]
    launch = _tma_launch(config, m, n, k, r, nonlinearity, out.device)
    launch(
        codes, w8, branch if r else None, aligned(up), out if n % 8 == 0 else None,
        out, row_scale, column_scale, bias,
    )  # fmt: skip


@planned
def _tma_launch(config: dict, m: int, n: int, k: int, r: int, nonlinearity: str, device: torch.device) -> Launch:
    settings = ("BM", "BN", "BK", "PIECES", "BAND", "num_warps", "num_stages")
    bm, bn, bk, pieces = (config[name] for name in settings[:4])
    programs = multiprocessors(device) * config["PER_SM"]
    tiles = cdiv(m, bm) * cdiv(n, bn)
    step = min(r, 32)
    blocks = dict(
        a_desc=(bm, bk), w_desc=(bn, bk), branch_desc=(bm, step), up_desc=(bn, step), y_desc=(bm, bn // pieces)
    )
    return Launch(
        _tma_kernel, (min(programs, tiles),), blocks,
        M=m, N=n, K=k, tiles=tiles, R=r, PROGRAMS=programs, NONLINEARITY=nonlinearity,
        **{name: config[name] for name in settings},
    )  # fmt: skip
