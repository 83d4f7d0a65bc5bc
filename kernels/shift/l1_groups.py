"""L1 normalization of groups of channels in Triton (l1_formula.py): a program has all pixels of some groups of a row.

It goes over them for the peak, the sum of codes, that of codes above the mean, and the result: the first time from
memory, then from the processor's cache; codes are made anew each time, for that costs less than to read them.
Backward it goes three times over dy and twice over codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.settings import remembered
from .coding import bits_of, code, noise_at, scale_of
from .l1_formula import LIMIT, STATS
from .noise import ONE, TWO

VALUES = 4096  # of a tile
CHANNELS = 32  # of a tile at least, as far as there are so many: what a memory access is long


@triton.jit
def _together(channels, NG: tl.constexpr, CG: tl.constexpr):
    """[NG CG] -> [NG, CG]."""
    return tl.reshape(channels, (NG, CG))


@triton.jit
def _wide(figures, NG: tl.constexpr, CG: tl.constexpr):
    """[NG] -> [NG CG]."""
    return tl.reshape(tl.broadcast_to(figures[:, None], (NG, CG)), (NG * CG,))


@triton.jit
def _program(P, C, per, NG: tl.constexpr, CG: tl.constexpr):
    """(row, groups [NG], channels [NG CG], which there are, number of the row's first value)."""
    row = tl.program_id(0)
    k = tl.arange(0, NG * CG)
    g = tl.program_id(1) * NG + tl.arange(0, NG)
    c = (tl.program_id(1) * NG + k // CG) * per + k % CG
    return row, g, c, (k % CG < per) & (c < C), row.to(tl.int64) * P * C


@triton.jit
def _tile(first, P, C, c, here, BP: tl.constexpr):
    """(places of values in the row, which there are) of BP pixels from the first on."""
    p = first + tl.arange(0, BP)
    return (p * C)[:, None] + c[None, :], (p < P)[:, None] & here[None, :]


@triton.jit
def _peaks(x_ptr, P, C, c, here, NG: tl.constexpr, CG: tl.constexpr, BP: tl.constexpr):
    """The largest magnitude in each group [NG]."""
    largest = tl.zeros((NG * CG,), tl.int32)
    for first in range(0, P, BP):
        at, mask = _tile(first, P, C, c, here, BP)
        largest = tl.maximum(largest, tl.max(bits_of(tl.load(x_ptr + at, mask=mask, other=0.0)), 0))
    return tl.max(_together(largest, NG, CG), 1).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x_ptr, at, mask, inverse, limit):
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = x * inverse[None, :]
    return code(v, v, limit, False)


@triton.jit(do_not_specialize=["P"])
def _norm_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, codes_ptr, stats_ptr, P, C, R, number, per, limit, floor, ratio, size,
    TINY: tl.constexpr, AFFINE: tl.constexpr, NG: tl.constexpr, CG: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """NG groups of a row, each of `per` channels, in CG columns of a tile."""
    row, g, c, here, base = _program(P, C, per, NG, CG)
    x_ptr, y_ptr, codes_ptr = x_ptr + base, y_ptr + base, codes_ptr + base
    step = scale_of(_peaks(x_ptr, P, C, c, here, NG, CG, BP), limit, TINY)
    inverse = _wide(tl.div_rn(1.0, step), NG, CG)
    sums = tl.zeros((NG * CG,), tl.int32)
    for first in range(0, P, BP):
        at, mask = _tile(first, P, C, c, here, BP)
        q = _codes(x_ptr, at, mask, inverse, limit)
        tl.store(codes_ptr + at, q.to(tl.int8), mask=mask)
        sums += tl.sum(q, 0)
    mean = tl.div_rn(tl.sum(_together(sums, NG, CG), 1).to(tl.float32), size)
    middle = _wide(mean, NG, CG)
    number_above = tl.zeros((NG * CG,), tl.int32)
    sums = tl.zeros((NG * CG,), tl.int32)
    for first in range(0, P, BP):
        at, mask = _tile(first, P, C, c, here, BP)
        q = _codes(x_ptr, at, mask, inverse, limit)
        above = (q.to(tl.float32) > middle[None, :]) & mask
        number_above += tl.sum(above.to(tl.int32), 0)
        sums += tl.sum(tl.where(above, q, 0), 0)
    higher = tl.sum(_together(number_above, NG, CG), 1).to(tl.float32)
    total = tl.sum(_together(sums, NG, CG), 1).to(tl.float32)
    spread = (total - mean * higher) * (2.0 * ratio / size) * step
    width = tl.where(spread < floor, floor, spread)  # NaN stays
    unit = tl.div_rn(step, width)
    place, figures = row * number + g, R * number
    tl.store(stats_ptr + place, mean, mask=g < number)
    tl.store(stats_ptr + figures + place, unit, mask=g < number)
    tl.store(stats_ptr + 2 * figures + place, width, mask=g < number)
    tl.store(stats_ptr + 3 * figures + place, tl.div_rn(higher, size), mask=g < number)
    tl.store(stats_ptr + 4 * figures + place, tl.where(spread == width, ratio / size, 0.0), mask=g < number)
    factor = _wide(unit, NG, CG)
    shift = -middle * factor
    if AFFINE:
        gamma = tl.load(gamma_ptr + c, mask=here, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + c, mask=here, other=0.0).to(tl.float32)
        factor = factor * gamma
        shift = shift * gamma + beta
    for first in range(0, P, BP):
        at, mask = _tile(first, P, C, c, here, BP)
        q = _codes(x_ptr, at, mask, inverse, limit).to(tl.float32)
        tl.store(y_ptr + at, q * factor[None, :] + shift[None, :], mask=mask)


@triton.jit(do_not_specialize=["P"])
def _gradient_kernel(
    dy_ptr, codes_ptr, stats_ptr, gamma_ptr, seed_ptr, dx_ptr, sums_ptr, P, C, R, number, per, limit, size,
    TINY: tl.constexpr, AFFINE: tl.constexpr, ONE: tl.constexpr, TWO: tl.constexpr, NG: tl.constexpr,
    CG: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The same groups; sums [2, R, C]: what a row gives to the gradients by gamma and beta."""
    row, g, c, here, base = _program(P, C, per, NG, CG)
    dy_ptr, dx_ptr, codes_ptr = dy_ptr + base, dx_ptr + base, codes_ptr + base
    place, figures = row * number + g, R * number
    mean = tl.load(stats_ptr + place, mask=g < number, other=0.0)
    unit = tl.load(stats_ptr + figures + place, mask=g < number, other=0.0)
    width = tl.load(stats_ptr + 2 * figures + place, mask=g < number, other=1.0)
    share = tl.load(stats_ptr + 3 * figures + place, mask=g < number, other=0.0)
    hold = tl.load(stats_ptr + 4 * figures + place, mask=g < number, other=0.0)
    step = scale_of(_peaks(dy_ptr, P, C, c, here, NG, CG, BP), limit, TINY)
    inverse = _wide(tl.div_rn(1.0, step), NG, CG)
    sums = tl.zeros((NG * CG,), tl.int32)
    products = tl.zeros((NG * CG,), tl.int32)
    for first in range(0, P, BP):
        at, mask = _tile(first, P, C, c, here, BP)
        v = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * inverse[None, :]
        p = tl.where(mask, code(v, noise_at(base + at, seed_ptr, ONE, TWO), limit, True), 0)
        q = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.int32)
        sums += tl.sum(p, 0)
        products += tl.sum(p * q, 0)
    middle = _wide(mean, NG, CG)
    by_gamma = (products.to(tl.float32) - middle * sums.to(tl.float32)) * _wide(unit * step, NG, CG)
    by_beta = sums.to(tl.float32) * _wide(step, NG, CG)
    factor = _wide(tl.div_rn(step, width), NG, CG)
    if AFFINE:
        tl.store(sums_ptr + row * C + c, by_gamma, mask=here)
        tl.store(sums_ptr + (R + row) * C + c, by_beta, mask=here)
        gamma = tl.load(gamma_ptr + c, mask=here, other=0.0).to(tl.float32)
        by_gamma, by_beta, factor = by_gamma * gamma, by_beta * gamma, factor * gamma
    centre = tl.sum(_together(by_beta, NG, CG), 1) / size
    pull = tl.sum(_together(by_gamma, NG, CG), 1) * hold
    everywhere = _wide((2.0 * share * pull - centre) / width, NG, CG)
    more = _wide(2.0 * pull / width, NG, CG)
    for first in range(0, P, BP):
        at, mask = _tile(first, P, C, c, here, BP)
        v = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * inverse[None, :]
        p = code(v, noise_at(base + at, seed_ptr, ONE, TWO), limit, True).to(tl.float32)
        q = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.float32)
        dx = p * factor[None, :] + everywhere[None, :] - tl.where(q > middle[None, :], more[None, :], 0.0)
        tl.store(dx_ptr + at, dx, mask=mask)


def normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, number: int, floor: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What shift_l1_norm returns of x [R, P, C], contiguous; floor: eps's root."""
    y, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    stats = x.new_empty(STATS, len(x), number, dtype=torch.float32)
    _forward(tuple(x.shape), number, floor, ratio, gamma is not None)(x, gamma, beta, y, codes, stats)
    return y, codes, stats


def gradient(dy: Tensor, codes: Tensor, stats: Tensor, gamma: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
    """What shift_l1_gradient returns of dy [R, P, C], contiguous."""
    dx, (rows, _, channels) = torch.empty_like(dy), dy.shape
    sums = None if gamma is None else dy.new_empty(2, rows, channels, dtype=torch.float32)
    _backward(tuple(dy.shape), stats.shape[2], gamma is not None)(dy, codes, stats, gamma, seed, dx, sums)
    return dx, dy.new_zeros(2, channels, dtype=torch.float32) if sums is None else sums.sum(1)


@remembered
def _forward(shape: tuple[int, int, int], number: int, floor: float, ratio: float, affine: bool) -> Launch:
    return Launch(_norm_kernel, floor=floor, ratio=ratio, AFFINE=affine, **_common(shape, number))


@remembered
def _backward(shape: tuple[int, int, int], number: int, affine: bool) -> Launch:
    return Launch(_gradient_kernel, AFFINE=affine, ONE=ONE, TWO=TWO, **_common(shape, number))


def _common(shape: tuple[int, int, int], number: int) -> dict:
    rows, pixels, channels = shape
    per = channels // number
    wide = next_power_of_2(per)
    groups = min(next_power_of_2(number), max(1, CHANNELS // wide))
    most = max(1, VALUES // (groups * wide))
    return {
        "grid": (rows, cdiv(number, groups)), "P": pixels, "C": channels, "R": rows, "number": number, "per": per,
        "limit": float(LIMIT), "size": float(pixels * per), "TINY": torch.finfo(torch.float32).tiny,
        "NG": groups, "CG": wide, "BP": min(most, next_power_of_2(pixels)), "num_warps": 8,
    }  # fmt: skip
