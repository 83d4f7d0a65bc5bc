"""The W4A8 product of rows of 4 bits and others of 8 in Triton: two blocks of rows in one launch.

    y[m, places[r]] = s_x[m] sum_g s[r, g] P[m, r, g]  +  b[places[r]],    P[m, r, g] = sum_{k in g} q_x[m, k] c[r, k]

Programs of the wide rows stand beside those of the narrow ones: tiles of the narrow block come first in each band,
those of the wide block after them, so that both kinds run at once and no launch waits for another. A narrow tile is
that of product_grouped.py; a wide one loads its int8 operand as it is. The scales of wide rows are read from the
weight itself, [w, G]: there are few. Outputs are stored by the index, which rises within a block of rows: of a
program's columns most lie side by side in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...runtime.integers import cdiv
from ...runtime.launch import Launch, planned
from .product_grouped import narrow_rows
from .product_progressive import packed
from .tiles import aligned
from .words import code_rows, token_rows


@triton.jit
def _wide(
    x_ptr, w_ptr, scales_ptr, top, left, M, N, K, inputs, groups,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The same of rows of 8 bits, whose scales lie [w, G]; inputs: K without what fills the rows of x up."""
    columns = left + tl.arange(0, BN)
    y = tl.zeros((BN, BM), tl.float32)
    for g in range(groups):
        w = code_rows(w_ptr, left, g * SIZE, N, inputs, BN, SIZE, TMA)
        x = token_rows(x_ptr, top, g * SIZE, M, K, BM, SIZE, TMA)
        scale = tl.load(scales_ptr + columns * groups + g, mask=columns < N, other=0.0).to(tl.float32)
        y += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
    return y


@triton.jit
def _row_mix_kernel(
    x_ptr, w_ptr, w8_ptr, factors_ptr, scales_ptr, scales8_ptr, row_scale_ptr, places_ptr, bias_ptr, y_ptr,
    M, N4, N8, K, inputs, groups,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr, TMA: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N4, BN) + tl.cdiv(N8, BN)
    tile, width = tl.program_id(0), BAND * blocks
    band = tile // width * BAND
    height = tl.minimum(tl.cdiv(M, BM) - band, BAND)
    top, block = (band + tile % width % height) * BM, tile % width // height
    narrow = tl.cdiv(N4, BN)
    wide = block >= narrow
    left = tl.where(wide, block - narrow, block) * BN
    first, count = tl.where(wide, N4, 0), tl.where(wide, N8, N4)
    if wide:
        y = _wide(x_ptr, w8_ptr, scales8_ptr, top, left, M, N8, K, inputs, groups, SIZE, BM, BN, TMA)
    else:
        y = narrow_rows(x_ptr, w_ptr, factors_ptr, scales_ptr, top, left, M, N4, K, groups, SIZE, BM, BN, TMA, PACKED)
    rows, columns = top + tl.arange(0, BM), left + tl.arange(0, BN)
    there = columns < count
    place = tl.load(places_ptr + first + columns, mask=there, other=0)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    y = (y * row_scale[None, :]).T
    if bias_ptr is not None:
        y += tl.load(bias_ptr + place, mask=there, other=0.0).to(tl.float32)[None, :]
    # from the tile's first row on, 32 bits reach: half of the registers of addresses
    where = tl.arange(0, BM)[:, None] * (N4 + N8) + place[None, :]
    tl.store(
        y_ptr + top.to(tl.int64) * (N4 + N8) + where,
        y.to(y_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & there[None, :],
    )


def product(
    tokens: tuple, weights: tuple, tables: tuple, wscales8: Tensor, places: Tensor, bias: Tensor | None, out: Tensor,
    size: int, config: dict,
) -> None:  # fmt: skip
    """Fill out [M, N] (float, contiguous), N = n + w.

    tokens and tables, of the n narrow rows: as in product_grouped.py; weights: qweight uint8 [n, K'/2] and int8
    [w, K]; wscales8 [w, G] float; places int32 [N]; bias [N] or None. size: 32, 64 or 128 inputs of a group.

    config: as in product_grouped.py.
    """
    (codes, row_scale), (qweight, qweight8), (factors, scales) = tokens, weights, tables
    sizes = (*codes.shape, len(qweight), *qweight8.shape)
    launch = _launch(config, *sizes, size, scales.shape[0])
    qweight = qweight.view(qweight8.dtype)
    both = (aligned(qweight), aligned(qweight8)) if config["TMA"] else (qweight, qweight8)
    launch(codes, *both, factors, scales, wscales8, row_scale, places, bias, out)


@planned
def _launch(config: dict, m: int, k: int, n: int, wide: int, inputs: int, size: int, groups: int) -> Launch:
    bm, bn = config["BM"], config["BN"]
    blocks = dict(x_ptr=(bm, size), w_ptr=(bn, max(size, 64) // 2), w8_ptr=(bn, size)) if config["TMA"] else None
    programs = cdiv(m, bm) * (cdiv(n, bn) + cdiv(wide, bn))
    return Launch(
        _row_mix_kernel, (programs,), blocks, M=m, N4=n, N8=wide, K=k, inputs=inputs, groups=groups,
        SIZE=size, BM=bm, BN=bn, BAND=config["BAND"], TMA=config["TMA"], PACKED=packed(config, _row_mix_kernel),
        num_warps=config["num_warps"], num_stages=config["num_stages"], maxnreg=config.get("maxnreg"),
    )  # fmt: skip
