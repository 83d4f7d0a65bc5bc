"""L1 normalization of rows, a layer norm's, in Triton (l1_formula.py): a program has whole rows, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import multiprocessors, remembered
from .coding import bits_of, code, noise_at, scale_of
from .l1_formula import LIMIT, STATS
from .noise import ONE, TWO

VALUES = 2048  # of a tile
PROGRAMS = 8  # of a multiprocessor, backward


@triton.jit
def _scaled(x, limit, TINY: tl.constexpr):
    """(steps [BR] of rows x [BR, BC], their values in these steps)."""
    step = scale_of(tl.max(bits_of(x), 1).to(tl.float32, bitcast=True), limit, TINY)
    return step, x * tl.div_rn(1.0, step)[:, None]


@triton.jit(do_not_specialize=["R"])
def _norm_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, codes_ptr, stats_ptr, R, C, limit, floor, ratio, size,
    TINY: tl.constexpr, AFFINE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BR rows."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    mask = (r < R)[:, None] & (c < C)[None, :]
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    step, v = _scaled(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), limit, TINY)
    q = code(v, v, limit, False)
    tl.store(codes_ptr + at, q.to(tl.int8), mask=mask)
    mean = tl.div_rn(tl.sum(q, 1).to(tl.float32), size)
    above = (q.to(tl.float32) > mean[:, None]) & mask
    higher = tl.sum(above.to(tl.int32), 1).to(tl.float32)
    total = tl.sum(tl.where(above, q, 0), 1).to(tl.float32)
    spread = (total - mean * higher) * (2.0 * ratio / size) * step
    width = tl.where(spread < floor, floor, spread)  # NaN stays
    unit = tl.div_rn(step, width)
    tl.store(stats_ptr + r, mean, mask=r < R)
    tl.store(stats_ptr + R + r, unit, mask=r < R)
    tl.store(stats_ptr + 2 * R + r, width, mask=r < R)
    tl.store(stats_ptr + 3 * R + r, tl.div_rn(higher, size), mask=r < R)
    tl.store(stats_ptr + 4 * R + r, tl.where(spread == width, ratio / size, 0.0), mask=r < R)
    y = (q.to(tl.float32) - mean[:, None]) * unit[:, None]
    if AFFINE:
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        y = y * gamma[None, :] + beta[None, :]
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit(do_not_specialize=["R", "programs"])
def _gradient_kernel(
    dy_ptr, codes_ptr, stats_ptr, gamma_ptr, seed_ptr, dx_ptr, sums_ptr, R, programs, C, limit, size,
    TINY: tl.constexpr, AFFINE: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th block of BR rows; sums [2, programs, C]: of the gradients by gamma and beta."""
    c = tl.arange(0, BC)
    all_gamma = tl.zeros((BC,), tl.float32)
    all_beta = tl.zeros((BC,), tl.float32)
    if AFFINE:
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for first in range(tl.program_id(0) * BR, R, programs * BR):
        r = first + tl.arange(0, BR)
        mask = (r < R)[:, None] & (c < C)[None, :]
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        mean = tl.load(stats_ptr + r, mask=r < R, other=0.0)
        unit = tl.load(stats_ptr + R + r, mask=r < R, other=0.0)
        width = tl.load(stats_ptr + 2 * R + r, mask=r < R, other=1.0)
        share = tl.load(stats_ptr + 3 * R + r, mask=r < R, other=0.0)
        hold = tl.load(stats_ptr + 4 * R + r, mask=r < R, other=0.0)
        step, v = _scaled(tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32), limit, TINY)
        p = tl.where(mask, code(v, noise_at(at, seed_ptr, ONE, TWO), limit, True), 0).to(tl.float32)
        off = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.float32) - mean[:, None]
        by_gamma = p * off * (unit * step)[:, None]
        by_beta = p * step[:, None]
        if AFFINE:
            all_gamma += tl.sum(by_gamma, 0)
            all_beta += tl.sum(by_beta, 0)
            by_gamma, by_beta = by_gamma * gamma[None, :], by_beta * gamma[None, :]
        centre = tl.sum(by_beta, 1) / size
        pull = tl.sum(by_gamma, 1) * hold
        dx = by_beta + (2.0 * share * pull - centre)[:, None] - tl.where(off > 0, 2.0 * pull[:, None], 0.0)
        tl.store(dx_ptr + at, dx * tl.div_rn(1.0, width)[:, None], mask=mask)
    if AFFINE:
        tl.store(sums_ptr + tl.program_id(0) * C + c, all_gamma, mask=c < C)
        tl.store(sums_ptr + (programs + tl.program_id(0)) * C + c, all_beta, mask=c < C)


def normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, number: int, floor: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What shift_l1_norm returns of x [R, 1, C], contiguous; floor: eps's root."""
    y, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    stats = x.new_empty(STATS, len(x), 1, dtype=torch.float32)
    _forward(len(x), x.shape[2], floor, ratio, gamma is not None)(x, gamma, beta, y, codes, stats)
    return y, codes, stats


def gradient(dy: Tensor, codes: Tensor, stats: Tensor, gamma: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
    """What shift_l1_gradient returns of dy [R, 1, C], contiguous."""
    dx, (rows, _, channels) = torch.empty_like(dy), dy.shape
    launch = _backward(rows, channels, gamma is not None, dy.device)
    sums = None if gamma is None else dy.new_empty(2, launch.grid[0], channels, dtype=torch.float32)
    launch(dy, codes, stats, gamma, seed, dx, sums)
    return dx, dy.new_zeros(2, channels, dtype=torch.float32) if sums is None else sums.sum(1)


@remembered
def _forward(rows: int, channels: int, floor: float, ratio: float, affine: bool) -> Launch:
    common = _common(rows, channels)
    return Launch(_norm_kernel, (cdiv(rows, common["BR"]),), floor=floor, ratio=ratio, AFFINE=affine, **common)


@remembered
def _backward(rows: int, channels: int, affine: bool, device: torch.device) -> Launch:
    common = _common(rows, channels)
    programs = min(cdiv(rows, common["BR"]), PROGRAMS * multiprocessors(device))
    return Launch(_gradient_kernel, (programs,), programs=programs, AFFINE=affine, ONE=ONE, TWO=TWO, **common)


def _common(rows: int, channels: int) -> dict:
    wide = next_power_of_2(channels)
    return {
        "R": rows, "C": channels, "limit": float(LIMIT), "size": float(channels),
        "TINY": torch.finfo(torch.float32).tiny, "BR": max(1, min(VALUES // wide, next_power_of_2(rows))), "BC": wide,
        "num_warps": 4 if wide <= VALUES else 8,
    }  # fmt: skip
