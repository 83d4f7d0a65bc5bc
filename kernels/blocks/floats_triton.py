"""Weights in blocks as floats in memory, in Triton: what the inputs of one call are multiplied by.

w[n, k] = s[n, g] (q[n, k] - z) + o[n, g],    g the block of k, rounded once
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.blocks import PACKED
from ..runtime.integers import cdiv
from ..runtime.launch import Launch
from ..runtime.settings import remembered

ROWS, COLUMNS = 4, 512  # of a program's tile: 16 values for each of its threads


@triton.jit
def _floats_kernel(
    q_ptr, scales_ptr, offsets_ptr, weight_ptr, N, K, GROUPS, SIZE, ZERO: tl.constexpr, FOUR: tl.constexpr,
    PACKED: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A tile of R outputs by B inputs."""
    n = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * B + tl.arange(0, B))[None, :]
    inside = (n < N) & (k < K)
    if FOUR:
        byte = k // PACKED * (PACKED // 2) + k % (PACKED // 2)
        raw = tl.load(q_ptr + n * (K // 2) + byte, mask=inside, other=0).to(tl.int32)
        steps = (raw >> (k % PACKED // (PACKED // 2) * 4)) & 15
    else:
        steps = tl.load(q_ptr + n * K + k, mask=inside, other=0).to(tl.int32)
    block = n * GROUPS + k // SIZE
    value = (steps - ZERO).to(tl.float32) * tl.load(scales_ptr + block, mask=inside, other=0.0)
    if offsets_ptr is not None:
        value += tl.load(offsets_ptr + block, mask=inside, other=0.0)
    tl.store(weight_ptr + n * K + k, value.to(weight_ptr.dtype.element_ty), mask=inside)


def floats(
    qweight: Tensor, scales: Tensor, offsets: Tensor | None, zero: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """w [N, K] in dtype, K = inputs; qweight int8 or uint8, scales and offsets float32, as the op has them."""
    weight = qweight.new_empty(len(qweight), inputs, dtype=dtype)
    launch = _plan(*scales.shape, inputs, zero, qweight.dtype == torch.uint8)
    launch(qweight.contiguous(), scales.contiguous(), None if offsets is None else offsets.contiguous(), weight)
    return weight


@remembered
def _plan(n: int, groups: int, k: int, zero: int, four: bool) -> Launch:
    return Launch(
        _floats_kernel, (cdiv(n, ROWS), cdiv(k, COLUMNS)), N=n, K=k, GROUPS=groups, SIZE=k // groups,
        ZERO=zero, FOUR=four, PACKED=PACKED, R=ROWS, B=COLUMNS, num_warps=4,
    )  # fmt: skip
