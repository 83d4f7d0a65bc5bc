"""The gradient of a convolution by its weight from operands that lie turned, in Triton, on 8-bit tensor cores.

    sums[n, tap, c] = sum_k d[n, off + k] x[c, k + shift(tap)],    g = sums d_steps[n] x_steps[c]

d and x are `across` of rounding.py: rows of one flat padded layout (w8a8/window.py) innermost, in d those of the
padding that the gradient by the input needs. Both have lines of the same length, so that a tap is a shift, and row
off + k of d belongs to row k of x; d is zero at padding. Rows are many and tiles few: programs share a sum, and add
their int32 parts in memory, in any order. More rows than an int32 holds products of are taken in parts, whose floats
are added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.shift import TERMS
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import capability, multiprocessors, remembered
from ..w8a8.window import Window

STEP = 128  # rows at a time
PROGRAMS = 2  # of a multiprocessor
LEAST = 4  # steps of a program: fewer are not worth the additions in memory


@triton.jit(do_not_specialize=["first", "steps", "share", "off", "WP"])
def _sums_kernel(
    d_ptr, x_ptr, out_ptr, first, steps, share, off, N, C, DP, XP, WP, KW, DH, DW,
    TAPS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of outputs by channels at one tap; `share` of the steps."""
    tile = tl.program_id(0)
    tap, tile = tile % TAPS, tile // TAPS
    n0, c0 = tile // tl.cdiv(C, BC) * BN, tile % tl.cdiv(C, BC) * BC
    shift = tap // KW * DH * WP + tap % KW * DW
    start = tl.program_id(1) * share
    total = tl.zeros((BN, BC), tl.int32)
    n, c = n0 + tl.arange(0, BN), c0 + tl.arange(0, BC)
    for step in range(start, tl.minimum(start + share, steps)):
        k = first + step * BK
        if TMA:
            d = d_ptr.load([n0, off + k])
            x = x_ptr.load([c0, shift + k])
        else:
            at = k + tl.arange(0, BK)
            mask = (n < N)[:, None] & (off + at < DP)[None, :]
            d = tl.load(d_ptr + n.to(tl.int64)[:, None] * DP + (off + at)[None, :], mask=mask, other=0)
            mask = (c < C)[:, None] & (shift + at < XP)[None, :]
            x = tl.load(x_ptr + c.to(tl.int64)[:, None] * XP + (shift + at)[None, :], mask=mask, other=0)
        total = tl.dot(d, x.T, total, out_dtype=tl.int32)
    at = (n[:, None] * TAPS + tap) * C + c[None, :]
    tl.atomic_add(out_ptr + at, total, mask=(n < N)[:, None] & (c < C)[None, :], sem="relaxed")


@triton.jit
def _worth_kernel(
    sums_ptr, d_steps_ptr, x_steps_ptr, out_ptr, rows, C, TAPS: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Rows (outputs and taps) of sums -> floats; ADD: to those that are there."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    mask = (r < rows)[:, None] & (c < C)[None, :]
    d, x = tl.load(d_steps_ptr + r // TAPS, mask=r < rows, other=0.0), tl.load(x_steps_ptr + c, mask=c < C, other=0.0)
    g = tl.load(sums_ptr + at, mask=mask, other=0).to(tl.float32) * (d[:, None] * x[None, :])
    if ADD:
        g += tl.load(out_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, g, mask=mask)


def weight_gradient(d: Tensor, x: Tensor, d_steps: Tensor, x_steps: Tensor, window: Window) -> Tensor:
    """d int8 [N, rows'], x int8 [C, rows'], steps float32 [N], [C] -> float32 [N, kh, kw, C].

    window: the images x with kernel, padding and dilation, stride 1.
    """
    n, c = len(d), len(x)
    out = x.new_empty(n, *window.kernel, c, dtype=torch.float32)
    for launch, worth in _plan(window, n, c, (d.shape[1], x.shape[1]), x.device):
        sums = torch.zeros_like(out, dtype=torch.int32)
        launch(d, x, sums)
        worth(sums, d_steps, x_steps, out)
    return out


@remembered
def _plan(
    window: Window, n: int, c: int, pitch: tuple[int, int], device: torch.device
) -> list[tuple[Launch, Launch]]:
    """Launches for each part of the rows; pitch: rows' of d and of x."""
    (dh, dw), wp = window.dilation, window.padded[1]
    around = [d * (k - 1) - p for k, p, d in zip(window.kernel, window.padding, window.dilation, strict=True)]
    off = around[0] * wp + around[1]
    steps, most = cdiv(window.rows - off, STEP), TERMS // STEP
    bn, bc = (min(128, max(32, next_power_of_2(size))) for size in (n, c))
    tiles = cdiv(n, bn) * cdiv(c, bc) * window.taps
    tma = capability(device) >= (9, 0)
    blocks = dict(d_ptr=(bn, STEP), x_ptr=(bc, STEP)) if tma else None
    wide = min(128, max(16, next_power_of_2(c)))
    found = []
    for first in range(0, steps, most):
        number = min(most, steps - first)
        parts = max(1, min(cdiv(PROGRAMS * multiprocessors(device), tiles), number // LEAST))
        share = cdiv(number, parts)
        sums = Launch(
            _sums_kernel, (tiles, cdiv(number, share)), blocks,
            first=first * STEP, steps=number, share=share, off=off, N=n, C=c, DP=pitch[0], XP=pitch[1], WP=wp,
            KW=window.kernel[1], DH=dh, DW=dw, TAPS=window.taps, BN=bn, BC=bc, BK=STEP, TMA=tma,
            num_warps=8 if bn * bc >= 128 * 128 else 4, num_stages=4,
        )  # fmt: skip
        worth = Launch(
            _worth_kernel, (cdiv(n * window.taps, 2048 // wide), cdiv(c, wide)),
            rows=n * window.taps, C=c, TAPS=window.taps, ADD=first > 0, BR=2048 // wide, BC=wide, num_warps=4,
        )  # fmt: skip
        found.append((sums, worth))
    return found
