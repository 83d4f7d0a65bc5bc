"""Shared by the products: the order of tiles, the last steps of a tile, and rows as TMA can load them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.workspace import Piece
from .nonlinearity import nonlinear


@triton.jit
def tile_place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """(first row, first column): down BAND blocks of rows, then one to the right, so that both sides stay in L2."""
    m_blocks = tl.cdiv(M, BM)
    width = BAND * tl.cdiv(N, BN)
    first = tile // width * BAND
    height = tl.minimum(m_blocks - first, BAND)
    return (first + tile % width % height) * BM, tile % width // height * BN


@triton.jit
def finish(
    y, rows, columns, branch_ptr, up_ptr, bias_ptr, y_ptr, M, N, RANK: tl.constexpr, R: tl.constexpr,
    NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """Store f(y [BM, BN] + branch [BM, R] U [BN, R]^T + bias), by pointers."""
    if R > 0:
        for first in tl.range(0, R, 32, num_stages=1):
            j = first + tl.arange(0, 32 if R > 16 else 16)
            branch = tl.load(branch_ptr + rows[:, None] * R + j[None, :], mask=(rows < M)[:, None], other=0.0)
            there = (columns < N)[:, None] & (j < RANK)[None, :]
            up = tl.load(up_ptr + columns[:, None] * RANK + j[None, :], mask=there, other=0.0)
            y = tl.dot(branch, up.T, y)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y = nonlinear(y, NONLINEARITY)
    where = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def stored(
    y, top, left, bias_ptr, y_desc, y_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr, NONLINEARITY: tl.constexpr,
):  # fmt: skip
    """Store f(y [BM, BN] + bias): by TMA where there is a descriptor, else by pointers."""
    rows = top + tl.arange(0, BM)
    columns = left + tl.arange(0, BN)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y = nonlinear(y, NONLINEARITY)
    if y_desc is not None:
        y_desc.store([top, left], y.to(y_ptr.dtype.element_ty))
    else:
        where = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def aligned(rows: Tensor | Piece | None) -> Tensor | Piece | None:
    """A matrix whose rows begin at multiples of 16 bytes, where TMA can begin to load."""
    if rows is None or (rows.stride(0) * rows.dtype.itemsize % 16 == 0 and rows.data_ptr() % 16 == 0):
        return rows
    rows = rows.tensor() if isinstance(rows, Piece) else rows
    extra = -rows.shape[1] % (16 // rows.element_size())
    return torch.nn.functional.pad(rows, (0, extra)) if extra else rows.clone()
