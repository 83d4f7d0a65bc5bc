"""`progressive_codes` in Triton: w8 = s1 (q - z), q - z, or t[q] of a codebook, as int8 in memory.

A program does whole runs of inputs. Floor in bytes: N K / 2 read, N K written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.int4 import GROUP
from ..runtime.integers import cdiv
from ..runtime.launch import Launch
from ..runtime.settings import remembered
from ..runtime.workspace import Piece

RUNS = 64  # of a program: 2048 bytes of codes, 16 for each of 128 threads


@triton.jit
def _codes_kernel(
    q_ptr, steps_ptr, zeros_ptr, levels_ptr, codes_ptr, K, WIDE, row_runs, all_runs,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """WIDE: codes of a row that are written, 0 past K; row_runs: packed runs of a row; levels of a row lie STRIDE
    apart."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    row, in_row = (run // row_runs).to(tl.int64), run % row_runs
    j = tl.arange(0, 32)
    there = run < all_runs
    raw = tl.load(q_ptr + run.to(tl.int64)[:, None] * 32 + j[None, :], mask=there[:, None], other=0)
    for half in tl.static_range(2):
        start = in_row * 64 + 32 * half
        inside = there & (start < K)
        place = row * GROUPS + start // SIZE
        codes = ((raw >> (4 * half)) & 15).to(tl.int32)
        if levels_ptr is None:
            codes -= 8
        else:
            own = levels_ptr + row[:, None] * STRIDE
            codes = tl.load(own + codes, mask=inside[:, None], other=0).to(tl.int32)
        if zeros_ptr is not None:
            codes -= tl.load(zeros_ptr + place, mask=inside, other=0).to(tl.int32)[:, None]
        if steps_ptr is not None:
            codes *= tl.load(steps_ptr + place, mask=inside, other=0).to(tl.int32)[:, None]
        k = start[:, None] + j[None, :]
        codes = tl.where(k < K, codes, 0)
        tl.store(codes_ptr + row[:, None] * WIDE + k, codes.to(tl.int8), mask=there[:, None] & (k < WIDE))


def codes(
    qweight: Tensor, wsteps: Tensor | None, wzeros: Tensor | None, groups: int, inputs: int, out: Tensor | Piece,
    levels: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill out int8 [N, W], W from K = inputs to K', with w8 and, past K, with 0; shapes were checked, and N > 0."""
    wsteps, wzeros, levels = (None if one is None else one.contiguous() for one in (wsteps, wzeros, levels))
    launch = _plan(len(qweight), groups, inputs, out.shape[1], 16 if levels is not None and len(levels) > 1 else 0)
    launch(qweight.contiguous().view(torch.int8), wsteps, wzeros, levels, out)


@remembered
def _plan(n: int, groups: int, k: int, wide: int, stride: int) -> Launch:
    runs = cdiv(k, GROUP)
    return Launch(
        _codes_kernel, (cdiv(n * runs, RUNS),), K=k, WIDE=wide, row_runs=runs, all_runs=n * runs,
        GROUPS=groups, SIZE=k // groups if groups > 1 else runs * GROUP, STRIDE=stride, RUNS=RUNS, num_warps=4,
    )  # fmt: skip
