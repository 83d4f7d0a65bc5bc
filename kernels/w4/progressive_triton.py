"""`progressive_codes` in Triton: w8 = s1 (q - z), q - z, or t[q] of a codebook, as int8 in memory.

A program does whole runs of inputs, four codes by each operation (products/words.py): one by one, the arithmetic took
longer than the memory. Floor in bytes: N K / 2 read, N K written.
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
from .products.words import codebook, looked_up, packed, whole

RUNS = 64  # of a program: 2048 bytes of codes, 16 for each of 128 threads


@triton.jit
def _widened(
    raw, steps_ptr, zeros_ptr, row, start, inside, GROUPS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """w8 of one half of each run [RUNS, 1, 32], whose inputs begin at `start`; of those not `inside`, anything."""
    place = row * GROUPS + start // SIZE
    lifted = tl.full(start.shape, 8, tl.int32)
    if zeros_ptr is not None:
        lifted += tl.load(zeros_ptr + place, mask=inside, other=0).to(tl.int32)
    if steps_ptr is None:
        codes = whole(raw, None, (128 - lifted)[:, None, None], HALF, PACKED)
    else:
        step = tl.load(steps_ptr + place, mask=inside, other=0).to(tl.int32)
        codes = whole(raw, step[:, None, None], (128 - step * lifted)[:, None, None], HALF, PACKED)
    return codes


@triton.jit
def _codes_kernel(
    q_ptr, steps_ptr, zeros_ptr, levels_ptr, codes_ptr, K, WIDE, row_runs, all_runs,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, RUNS: tl.constexpr, FULL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """WIDE: codes of a row that are written, 0 past K; FULL: K and WIDE are whole runs; row_runs: packed runs of a
    row; levels of a row lie STRIDE words apart."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    row, in_row = (run // row_runs).to(tl.int64), run % row_runs
    j = tl.arange(0, 32)[None, None, :]
    known = run < all_runs
    there = known[:, None, None]
    raw = tl.load(q_ptr + run.to(tl.int64)[:, None, None] * 32 + j, mask=there, other=0)
    if levels_ptr is not None:
        low, high = looked_up(raw, codebook(levels_ptr, row, all_runs // row_runs, STRIDE), PACKED)
    else:
        start = in_row * 64
        low = _widened(raw, steps_ptr, zeros_ptr, row, start, known & (start < K), GROUPS, SIZE, 0, PACKED)
        start += 32
        high = _widened(raw, steps_ptr, zeros_ptr, row, start, known & (start < K), GROUPS, SIZE, 1, PACKED)
    k = (in_row * 64)[:, None, None] + j
    where = codes_ptr + row[:, None, None] * WIDE + k
    if FULL:
        tl.store(where, low, mask=there)
        tl.store(where + 32, high, mask=there)
    else:
        tl.store(where, tl.where(k < K, low, 0), mask=there & (k < WIDE))
        tl.store(where + 32, tl.where(k + 32 < K, high, 0), mask=there & (k + 32 < WIDE))


def codes(
    qweight: Tensor, wsteps: Tensor | None, wzeros: Tensor | None, groups: int, inputs: int, out: Tensor | Piece,
    levels: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill out int8 [N, W], W from K = inputs to K', with w8 and, past K, with 0; shapes were checked, and N > 0."""
    wsteps, wzeros, levels = (None if one is None else one.contiguous() for one in (wsteps, wzeros, levels))
    launch = _plan(len(qweight), groups, inputs, out.shape[1], 4 if levels is not None and len(levels) > 1 else 0)
    words = None if levels is None else levels.view(torch.int32)
    launch(qweight.contiguous().view(torch.int8), wsteps, wzeros, words, out)


@remembered
def _plan(n: int, groups: int, k: int, wide: int, stride: int) -> Launch:
    runs = cdiv(k, GROUP)
    return Launch(
        _codes_kernel, (cdiv(n * runs, RUNS),), K=k, WIDE=wide, row_runs=runs, all_runs=n * runs,
        GROUPS=groups, SIZE=k // groups if groups > 1 else runs * GROUP, STRIDE=stride, RUNS=RUNS,
        FULL=k % GROUP == 0, PACKED=packed({}, _codes_kernel), num_warps=4,
    )  # fmt: skip
