"""Binary-coded weights as weights of 16 bits in memory, in Triton: what many rows are multiplied by.

w[n, k] = sum_i alpha[n, g, i] b_i[n, k]  +  z[n, g],    g the group of k
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.bcq import TILE, WORD
from ..runtime.integers import cdiv
from ..runtime.launch import Launch, planned


@triton.jit
def _unpack_kernel(
    words_ptr, alphas_ptr, offsets_ptr, weight_ptr, N, K, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of outputs by 32 inputs."""
    tile, w = tl.program_id(0), tl.program_id(1)
    n, place = tl.arange(0, TILE), tl.arange(0, 32)[None, :]
    group = tile * GROUPS + tl.minimum(w // SPAN, GROUPS - 1)
    bit = place // 2 + place % 2 * 16
    weight = tl.zeros((TILE, 32), tl.float32)
    for i in tl.static_range(BITS):
        words = tl.load(words_ptr + ((tile * WIDTH + w) * BITS + i).to(tl.int64) * TILE + n)
        alpha = tl.load(alphas_ptr + (group * BITS + i) * TILE + n).to(tl.float32)[:, None]
        weight += tl.where(words[:, None] >> bit & 1 == 1, alpha, -alpha)
    if offsets_ptr is not None:
        weight += tl.load(offsets_ptr + group * TILE + n).to(tl.float32)[:, None]
    n, k = tile * TILE + n[:, None], w * 32 + place
    at = weight_ptr + n.to(tl.int64) * K + k
    tl.store(at, weight.to(weight_ptr.dtype.element_ty), mask=(n < N) & (k < K))


def unpacked(
    qweight: Tensor, alphas: Tensor, offsets: Tensor | None, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] of a dtype, made in this call."""
    weight = qweight.new_empty(outputs, inputs, dtype=dtype)
    _launch(outputs, inputs, alphas.shape[1], qweight.shape[2])(qweight, alphas, offsets, weight)
    return weight


def _launch(n: int, k: int, groups: int, bits: int) -> Launch:
    return _planned({}, n, k, groups, bits)


@planned
def _planned(config: dict, n: int, k: int, groups: int, bits: int) -> Launch:
    width = cdiv(k, WORD)
    return Launch(
        _unpack_kernel, (cdiv(n, TILE), width), N=n, K=k, WIDTH=width, GROUPS=groups,
        SPAN=width if groups == 1 else k // groups // WORD, BITS=bits, TILE=TILE, num_warps=4,
    )  # fmt: skip
