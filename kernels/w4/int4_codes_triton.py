"""`int4_codes` and `int4_floats` in Triton: one kernel for all sizes of groups. A program does whole rows.

Scales that are folded make two passes over a row's packed codes, the second out of L1 or L2: the first finds the
largest scale of the groups in use. One scale a row, and floats, which are not folded, make one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.int4 import GROUP
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.rounding import ROUND
from ..runtime.settings import remembered

BYTES = 2048  # of codes that a program has at hand: 16 for each thread
MOST_ROWS = 16


@triton.jit
def _half(
    raw, wscales_ptr, wzeros_ptr, levels_ptr, n, start, in_row, N, K, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One half of packed runs, `raw` [R, B, 32] of rows n whose inputs begin at `start` [B]: (q - z, s [R, B]);
    t[q] in the place of q - z where there are levels.

    A half lies in one group. Where it lies outside the weight both are 0.
    """
    inside = in_row[:, None] & (start < K)[None, :]
    place = n.to(tl.int64)[:, None] * GROUPS + (start // SIZE)[None, :]
    scale = tl.load(wscales_ptr + place, mask=inside, other=0.0).to(tl.float32)
    steps = ((raw >> (4 * HALF)) & 15).to(tl.int32)
    if levels_ptr is None:
        steps -= 8
    else:
        steps = tl.load(levels_ptr + n[:, None, None] * STRIDE + steps, mask=inside[:, :, None], other=0).to(tl.int32)
    if wzeros_ptr is not None:
        steps -= tl.load(wzeros_ptr + place, mask=inside, other=0).to(tl.int32)[:, :, None]
    return tl.where(inside[:, :, None], steps, 0), scale


@triton.jit
def _int4_codes_kernel(
    q_ptr, wscales_ptr, wzeros_ptr, levels_ptr, codes_ptr, scales_ptr, N, K, RUNS,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PEAK: tl.constexpr, R: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """RUNS: packed runs of a row; R rows and B runs are at hand at a time. GROUPS of SIZE inputs. Levels of a row
    lie STRIDE apart.

    codes_ptr: int8, or floats, which are weights whole: nothing is left for scales_ptr.
    """
    whole: tl.constexpr = codes_ptr.dtype.element_ty != tl.int8
    n = tl.program_id(0) * R + tl.arange(0, R)
    in_row = n < N
    j = tl.arange(0, 32)
    row = n.to(tl.int64)
    if whole:
        pass
    elif GROUPS == 1:
        channel = tl.load(wscales_ptr + n, mask=in_row, other=0.0).to(tl.float32)
        known = in_row
        divisor = tl.full((R,), 1.0, tl.float32)
        tl.store(scales_ptr + n, channel, mask=in_row)
    else:
        peak = tl.zeros((R,), tl.float32)
        strange = tl.zeros((R,), tl.int32)
        for first in range(0, RUNS, B):
            run = first + tl.arange(0, B)
            mask = in_row[:, None] & (run < RUNS)[None, :]
            where = q_ptr + (row[:, None] * RUNS + run[None, :])[:, :, None] * 32 + j[None, None, :]
            raw = tl.load(where, mask=mask[:, :, None], other=0x88)
            for half in tl.static_range(2):
                steps, scale = _half(
                    raw, wscales_ptr, wzeros_ptr, levels_ptr, n, run * 64 + 32 * half, in_row, N, K, GROUPS, SIZE,
                    STRIDE, half,
                )  # fmt: skip
                used = tl.max((steps != 0).to(tl.int32), 2) != 0
                finite = tl.abs(scale) < float("inf")
                peak = tl.maximum(peak, tl.max(tl.where(used & finite, scale, 0.0), 1))
                strange = tl.maximum(strange, tl.max(tl.where(finite, 0, 1), 1))
        known = strange == 0
        channel = tl.div_rn(peak, PEAK)
        divisor = tl.where(channel > 0, channel, 1.0)
        tl.store(scales_ptr + n, tl.where(known, divisor, float("nan")), mask=in_row)
    for first in range(0, RUNS, B):
        run = first + tl.arange(0, B)
        mask = in_row[:, None] & (run < RUNS)[None, :]
        where = q_ptr + (row[:, None] * RUNS + run[None, :])[:, :, None] * 32 + j[None, None, :]
        raw = tl.load(where, mask=mask[:, :, None], other=0x88)
        for half in tl.static_range(2):
            start = run * 64 + 32 * half
            steps, scale = _half(
                raw, wscales_ptr, wzeros_ptr, levels_ptr, n, start, in_row, N, K, GROUPS, SIZE, STRIDE, half
            )
            if whole:
                steps = steps.to(tl.float32) * scale[:, :, None]
            elif GROUPS > 1:
                ratio = tl.where(known[:, None], tl.div_rn(scale, divisor[:, None]), 0.0)
                value = tl.minimum(tl.maximum(steps.to(tl.float32) * ratio[:, :, None], -127.0), 127.0)
                value = tl.where(steps != 0, value, 0.0)
                steps = ((value + ROUND) - ROUND).to(tl.int32)
            k = start[:, None] + j[None, :]
            out = in_row[:, None, None] & (k < K)[None, :, :]
            tl.store(
                codes_ptr + row[:, None, None] * K + k[None, :, :], steps.to(codes_ptr.dtype.element_ty), mask=out
            )


def int4_codes(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, peak: float, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The codes and scales of the op of this name; shapes were checked there, and N > 0. peak: P."""
    codes = qweight.new_empty(len(qweight), inputs, dtype=torch.int8)
    scales = qweight.new_empty(len(qweight), dtype=torch.float32)
    _unpack(qweight, wscales, wzeros, levels, codes, scales, peak)
    return codes, scales


def int4_floats(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The weight of the op of this name; shapes were checked there, and N > 0."""
    weight = qweight.new_empty(len(qweight), inputs, dtype=dtype)
    _unpack(qweight, wscales, wzeros, levels, weight, None, 1.0)
    return weight


def _unpack(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, levels: Tensor | None, out: Tensor,
    scales: Tensor | None, peak: float,
) -> None:  # fmt: skip
    launch = _plan(*wscales.shape, out.shape[1], peak, 16 if levels is not None and len(levels) > 1 else 0)
    wzeros, levels = (None if one is None else one.contiguous() for one in (wzeros, levels))
    launch(qweight.contiguous(), wscales.contiguous(), wzeros, levels, out, scales)


@remembered
def _plan(n: int, groups: int, k: int, peak: float, stride: int) -> Launch:
    runs = cdiv(k, GROUP)
    at_hand = min(next_power_of_2(runs), BYTES // 32)
    rows = min(MOST_ROWS, BYTES // 32 // at_hand)
    size = k // groups if groups > 1 else runs * GROUP
    return Launch(
        _int4_codes_kernel, (cdiv(n, rows),), N=n, K=k, RUNS=runs,
        GROUPS=groups, SIZE=size, STRIDE=stride, PEAK=peak, R=rows, B=at_hand, num_warps=4,
    )  # fmt: skip
