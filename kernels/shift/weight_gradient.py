"""The gradient of a convolution by its weight in Triton, on 8-bit tensor cores.

    g[n, tap, c] = sum_m d[m, n] x[pixel(m) + tap, c]

m runs over the output pixels of all samples, which are many where outputs are few: they are shared out to programs
whose int32 sums are added up in memory, in any order, for integers have no rounding. Both operands lie with m
outermost; 8-bit tensor cores want it innermost, and Triton turns each tile on its way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import multiprocessors, remembered
from ..w8a8.window import Window

ROWS = 64  # of a step
PROGRAMS = 4  # of a multiprocessor
LEAST = 8  # steps of a program: fewer are not worth the additions in memory


@triton.jit
def _load(
    d_ptr, x_ptr, start, last, tap, n, c, N, H, W, OH, OW,
    C: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rows of d, and the pixels that the tap reads for them; zeros beyond the last row and outside of images."""
    m = start + tl.arange(0, BM)
    image, rest = m // (OH * OW), m % (OH * OW)
    y = rest // OW * SH - PH + tap // KW * DH
    x = rest % OW * SW - PW + tap % KW * DW
    inside = (m < last) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    at = ((image * H + y) * W + x).to(tl.int64)[:, None] * C + c[None, :]
    pixels = tl.load(x_ptr + at, mask=inside[:, None] & (c < C)[None, :], other=0)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    return tl.load(d_ptr + at, mask=(m < last)[:, None] & (n < N)[None, :], other=0), pixels


@triton.jit(do_not_specialize=["M", "share"])
def _gradient_kernel(
    d_ptr, x_ptr, out_ptr, M, share, N, H, W, OH, OW,
    C: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile of outputs by channels at one tap; `share` rows of the sum, a multiple of BM.

    Tiles are turned in registers, so that Triton does not load ahead; the next ones are asked for before the product.
    """
    tile = tl.program_id(0)
    tap, tile = tile % TAPS, tile // TAPS
    n = tile // tl.cdiv(C, BC) * BN + tl.arange(0, BN)
    c = tile % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, M)
    total = tl.zeros((BN, BC), tl.int32)
    d, pixels = _load(d_ptr, x_ptr, first, last, tap, n, c, N, H, W, OH, OW, C, KW, SH, SW, PH, PW, DH, DW, BM)
    for start in range(first, last, BM):
        next_d, next_pixels = _load(
            d_ptr, x_ptr, start + BM, last, tap, n, c, N, H, W, OH, OW, C, KW, SH, SW, PH, PW, DH, DW, BM
        )
        total = tl.dot(tl.trans(d), pixels, total, out_dtype=tl.int32)
        d, pixels = next_d, next_pixels
    at = (n[:, None] * TAPS + tap) * C + c[None, :]
    tl.atomic_add(out_ptr + at, total, mask=(n < N)[:, None] & (c < C)[None, :], sem="relaxed")


def weight_gradient(gradient: Tensor, x: Tensor, window: Window) -> Tensor:
    """gradient [B, H', W', N] int8, x [B, H, W, C] int8 -> [N, kh, kw, C] int32."""
    n, c = gradient.shape[3], x.shape[3]
    out = x.new_zeros(n, *window.kernel, c, dtype=torch.int32)
    _plan(window, n, c, x.device)(gradient.contiguous(), x.contiguous(), out)
    return out


@remembered
def _plan(window: Window, n: int, c: int, device: torch.device) -> Launch:
    (oh, ow), rows = window.output, window.batch * window.output[0] * window.output[1]
    bn, bc = (min(128, max(32, next_power_of_2(size))) for size in (n, c))
    tiles = cdiv(n, bn) * cdiv(c, bc) * window.taps
    processors = multiprocessors(device)
    parts = max(1, min(cdiv(PROGRAMS * processors, tiles), rows // (LEAST * ROWS)))
    share = cdiv(cdiv(rows, parts), ROWS) * ROWS
    (ph, pw), (sh, sw), (dh, dw) = window.padding, window.stride, window.dilation
    return Launch(
        _gradient_kernel, (tiles, cdiv(rows, share)),
        M=rows, share=share, N=n, H=window.h, W=window.w, OH=oh, OW=ow, C=c, KW=window.kernel[1], TAPS=window.taps,
        SH=sh, SW=sw, PH=ph, PW=pw, DH=dh, DW=dw, BM=ROWS, BN=bn, BC=bc, num_warps=8,
    )  # fmt: skip
