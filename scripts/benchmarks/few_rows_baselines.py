"""What products of few rows with weights of few bits are compared with: weights made in the loop, and torch's own.

    y[m, n] = sum_k x[m, k] w[n, k],    w[n, k] = sum_i alpha[n, g, i] b_i[n, k] in 16 bits, made tile by tile

That is the place of OPTQ's kernel in "LUT-GEMM" (arXiv:2206.09557): the same stored bits, and a weight for every
product. Scripts alone use it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq4dm.kernels.formats.bcq import TILE, WORD

ROWS = 16
INNER = 8  # of tinygemm's layout


@triton.jit
def _dequantize_kernel(
    x_ptr, words_ptr, alphas_ptr, y_ptr, M, N, K, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    BITS: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of outputs, all rows, W words at a time, which lie in one group."""
    tile, n = tl.program_id(0), tl.arange(0, TILE)
    m = tl.arange(0, ROWS)
    place = tl.arange(0, 32)[None, None, :]
    bit = place // 2 + place % 2 * 16
    sums = tl.zeros((TILE, ROWS), tl.float32)
    for first in tl.range(0, WIDTH, W, num_stages=3):
        w = first + tl.arange(0, W)[None, :]
        k = first * 32 + tl.arange(0, 32 * W)
        x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m[None, :] < M) & (k[:, None] < K), other=0)
        weight = tl.zeros((TILE, W, 32), tl.float32)
        for i in tl.static_range(BITS):
            at = words_ptr + ((tile * WIDTH + w) * BITS + i).to(tl.int64) * TILE + n[:, None]
            words = tl.load(at, mask=w < WIDTH, other=0)[:, :, None]
            group = tile * GROUPS + tl.minimum(first // SPAN, GROUPS - 1)
            alpha = tl.load(alphas_ptr + (group * BITS + i) * TILE + n).to(tl.float32)[:, None, None]
            weight += tl.where((words >> bit & 1) == 1, alpha, -alpha)
        weight = tl.reshape(weight, (TILE, W * 32)).to(x.dtype)
        sums = tl.dot(weight, x, sums)
    n += tile * TILE
    at = y_ptr + m[None, :] * N + n[:, None]
    tl.store(at, sums.to(y_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


def dequantized_in_loop(x: Tensor, words: Tensor, alphas: Tensor, outputs: int) -> Tensor:
    """x [M, K] in 16 bits, at most 16 contiguous rows -> [M, N], without bias and offsets."""
    (m, k), groups, bits = x.shape, alphas.shape[1], words.shape[2]
    y, width = x.new_empty(m, outputs), words.shape[1]
    span = width if groups == 1 else k // groups // WORD
    _dequantize_kernel[(len(words),)](
        x, words, alphas, y, m, outputs, k, width, groups, span, bits, min(4, span), TILE, ROWS, num_warps=4
    )
    return y


def tinygemm(x: Tensor, n: int, k: int, group: int, seed: int) -> Callable[[], Tensor]:
    """torch's int4 product of this size on random codes; raises RuntimeError where this torch or device has none."""
    generator = torch.Generator(x.device).manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, device=x.device, dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, INNER)
    grid = torch.rand(k // group, n, 2, generator=generator, device=x.device).bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, grid)
