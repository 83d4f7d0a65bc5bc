"""The gradient of a convolution by its weight from operands that lie turned, in Triton, on 8-bit tensor cores.

    sums[n, ky, kx, c] = sum_k gradient[kx, n, k] pixels[c, k + ky dh W''],    g = sums d_steps[n] x_steps[c]

Both operands are those of turned.py. Places k are many and tiles few: programs share a sum, and add their int32 parts
in memory, in any order. More places than an int32 holds products of are taken in parts, whose floats are added.
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
from .turned import STEP, length_of, line_of

PROGRAMS = 2  # of a multiprocessor
LEAST = 4  # steps of a program: fewer are not worth the additions in memory


@triton.jit(do_not_specialize=["first", "steps", "share", "line"])
def _sums_kernel(
    d_ptr, x_ptr, out_ptr, first, steps, share, line, N, C, length,
    TAPS: tl.constexpr, KW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of outputs by channels at one tap; `share` of the steps. line: places between lines of the window."""
    tile = tl.program_id(0)
    tap, tile = tile % TAPS, tile // TAPS
    n0, c0 = tile // tl.cdiv(C, BC) * BN, tile % tl.cdiv(C, BC) * BC
    shift = tap // KW * line
    row = tap % KW * N + n0
    n, c = n0 + tl.arange(0, BN), c0 + tl.arange(0, BC)
    total = tl.zeros((BN, BC), tl.int32)
    start = tl.program_id(1) * share
    for step in range(start, tl.minimum(start + share, steps)):
        k = first + step * BK
        if TMA:
            d = d_ptr.load([row, k])
            x = x_ptr.load([c0, k + shift])
        else:
            at = k + tl.arange(0, BK)
            rows = (row + tl.arange(0, BN)).to(tl.int64)[:, None] * length
            d = tl.load(d_ptr + rows + at[None, :], mask=(n < N)[:, None] & (at < length)[None, :], other=0)
            at += shift
            rows = c.to(tl.int64)[:, None] * length
            x = tl.load(x_ptr + rows + at[None, :], mask=(c < C)[:, None] & (at < length)[None, :], other=0)
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


def weight_gradient(gradient: Tensor, pixels: Tensor, d_steps: Tensor, x_steps: Tensor, window: Window) -> Tensor:
    """gradient int8 [kw N, length], pixels int8 [C, length], steps float32 [N], [C] -> float32 [N, kh, kw, C].

    window: the images with kernel, padding and dilation, stride 1.
    """
    out = pixels.new_empty(len(d_steps), *window.kernel, len(x_steps), dtype=torch.float32)
    for launch, worth in _plan(window, len(d_steps), len(x_steps), pixels.device):
        sums = torch.zeros_like(out, dtype=torch.int32)
        launch(gradient, pixels, sums)
        worth(sums, d_steps, x_steps, out)
    return out


@remembered
def _plan(window: Window, n: int, c: int, device: torch.device) -> list[tuple[Launch, Launch]]:
    """Launches for each part of the places."""
    length = length_of(window)
    steps, most = length // STEP, TERMS // STEP
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
            first=first * STEP, steps=number, share=share, line=window.dilation[0] * line_of(window), N=n, C=c,
            length=length, TAPS=window.taps, KW=window.kernel[1], BN=bn, BC=bc, BK=STEP, TMA=tma,
            num_warps=8 if bn * bc >= 128 * 128 else 4, num_stages=4,
        )  # fmt: skip
        worth = Launch(
            _worth_kernel, (cdiv(n * window.taps, 2048 // wide), cdiv(c, wide)),
            rows=n * window.taps, C=c, TAPS=window.taps, ADD=first > 0, BR=2048 // wide, BC=wide, num_warps=4,
        )  # fmt: skip
        found.append((sums, worth))
    return found
