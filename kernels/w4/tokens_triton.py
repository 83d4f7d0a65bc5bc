"""The first launch of a W4A8 product in integers, in Triton: tokens to int8, and tables of the weight's groups.

    s_x[m] = max_k |x[m, k]| / 127  (1 for zeros),  q_x[m, k] = round(x[m, k] * (1 / s_x[m])),  S[m] = sum_k q_x[m, k]
    factors[g, n] = s1[n, g] + 256 (128 - s1[n, g] (z[n, g] + 8))        of progressive weights: words.py
    scales[g, n]  = s[n, g] in float32,  factors as above with s1 = 1    of grouped ones
    16 s and z = 0 of high halves of 8-bit codes, s and z = -8 of low ones (row_mix.py)

To the bit as tokens.py: quotients are rounded once, halves go to the even code, NaN has code 0. Codes lie in rows of
K', K up to a multiple of 64, filled with 0. x is read once where a row fits into registers (K' up to HELD), or twice.
Tables live for one call: kept, they would take 4 or 8 bytes a group, which has 16 to 64. Programs of tokens come
first, for they run longest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.int4 import GROUP, high_rows
from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.launch import Launch
from ..runtime.rounding import ROUND
from ..runtime.settings import remembered

HELD = 16384
BN, BG = 64, 16  # rows and groups of a table that a program makes
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _read(x_ptr, m, k, M, K, stride_m):
    where = x_ptr + m.to(tl.int64)[:, None] * stride_m + k[None, :]
    return tl.load(where, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _write(x, inverse, q_ptr, m, k, M, KP):
    """Store the codes of x [ROWS, STEP], and return them."""
    v = x.to(tl.float32) * inverse[:, None]
    v = tl.minimum(tl.maximum(tl.where(v == v, v, 0.0), -127.0), 127.0)
    codes = (v + ROUND) - ROUND
    where = q_ptr + m.to(tl.int64)[:, None] * KP + k[None, :]
    tl.store(where, codes.to(tl.int8), mask=(m < M)[:, None] & (k < KP)[None, :])
    return codes


@triton.jit
def _tokens(
    block, x_ptr, q_ptr, scale_ptr, sum_ptr, M, K, KP, stride_m,
    ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    m = block * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, STEP)
    peak = tl.zeros((ROWS, STEP), tl.int32)
    total = tl.zeros((ROWS, STEP), tl.float32)
    held = ()
    if IN_REGISTERS:
        for i in tl.static_range(STEPS):
            held = held + (_read(x_ptr, m, i * STEP + columns, M, K, stride_m),)
            peak = tl.maximum(peak, tl.abs(held[i].to(tl.float32)).to(tl.int32, bitcast=True))
    else:
        for i in range(STEPS):
            x = _read(x_ptr, m, i * STEP + columns, M, K, stride_m)
            peak = tl.maximum(peak, tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True))
    # as bits, magnitudes are ordered like floats, with NaN on top
    scale = tl.div_rn(tl.max(peak, 1).to(tl.float32, bitcast=True), 127.0)
    scale = tl.where(scale < TINY, 1.0, scale)
    inverse = tl.div_rn(1.0, scale)
    if IN_REGISTERS:
        for i in tl.static_range(STEPS):
            total += _write(held[i], inverse, q_ptr, m, i * STEP + columns, M, KP)
    else:
        for i in range(STEPS):
            x = _read(x_ptr, m, i * STEP + columns, M, K, stride_m)
            total += _write(x, inverse, q_ptr, m, i * STEP + columns, M, KP)
    tl.store(scale_ptr + m, scale, mask=m < M)
    if sum_ptr is not None:  # whole numbers below 2^24 in each place of `total`
        tl.store(sum_ptr + m, tl.sum(total.to(tl.int32), 1), mask=m < M)


@triton.jit
def _among(n, wide_ptr, wide, wide_bits):
    """(1 where n [BN, 1] is one of the `wide` numbers at wide_ptr, which rise, else 0; how many of them lie below).

    By halves: wide < 2^wide_bits.
    """
    below = tl.zeros(n.shape, tl.int32)
    for bit in range(wide_bits):
        further = below + (1 << (wide_bits - 1 - bit))
        number = tl.load(wide_ptr + further - 1, mask=further <= wide, other=2147483647)
        below = tl.where(number < n, further, below)
    number = tl.load(wide_ptr + below, mask=below < wide, other=-1)
    return (number == n).to(tl.int32), below


@triton.jit
def _tables(
    block, steps_ptr, zeros_ptr, wscales_ptr, factors_ptr, scales_ptr, wide_ptr, slots_ptr, N, width, wide, wide_bits,
    high, GROUPS, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """BN rows and BG groups, read along groups and written along rows: `width` of them, of which N are known."""
    n = (block % tl.cdiv(width, BN) * BN + tl.arange(0, BN))[:, None]
    g = (block // tl.cdiv(width, BN) * BG + tl.arange(0, BG))[None, :]
    there = (n < width) & (g < GROUPS)
    place = g * width + n
    row, zero_row, known, zeroed = n, n, there, there
    if wide_ptr is not None:
        is_wide, before = _among(n - high, wide_ptr, wide, wide_bits)
        row = tl.load(wide_ptr + n, mask=n < wide, other=0) + tl.where(n < high, 0, n - high)
        low = (n >= high) & (n < N)
        known = there & ((n < wide) | low)
        zero_row, zeroed = n - high - before, there & low & (is_wide == 0)
        if block < tl.cdiv(width, BN):
            tl.store(slots_ptr + n - high, 2 * before + is_wide, mask=low)
    source = row * GROUPS + g
    if scales_ptr is not None:
        scale = tl.load(wscales_ptr + source, mask=known, other=0.0).to(tl.float32)
        if wide_ptr is not None:
            scale *= tl.where(n < high, 16.0, 1.0)
        tl.store(scales_ptr + place, scale, mask=there)
    if factors_ptr is not None:
        step = tl.full((BN, BG), 1, tl.int32)
        zero = tl.zeros((BN, BG), tl.int32)
        if steps_ptr is not None:
            step = tl.load(steps_ptr + source, mask=there, other=0).to(tl.int32)
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + zero_row * GROUPS + g, mask=zeroed, other=0).to(tl.int32)
        if wide_ptr is not None:
            zero = tl.where(is_wide > 0, -8, zero)
        tl.store(factors_ptr + place, step + 256 * (128 - step * (zero + 8)), mask=there)


@triton.jit
def _prepare_kernel(
    x_ptr, q_ptr, scale_ptr, sum_ptr, steps_ptr, zeros_ptr, wscales_ptr, factors_ptr, scales_ptr, wide_ptr,
    slots_ptr, ready_ptr, M, K, KP, stride_m, N, width, wide, wide_bits, high, GROUPS, token_programs,
    ROWS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, IN_REGISTERS: tl.constexpr, BN: tl.constexpr,
    BG: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < token_programs:
        if ready_ptr is not None:
            tl.store(ready_ptr + program, 0)
        _tokens(program, x_ptr, q_ptr, scale_ptr, sum_ptr, M, K, KP, stride_m, ROWS, STEP, STEPS, IN_REGISTERS)
    else:
        block = program - token_programs
        _tables(
            block, steps_ptr, zeros_ptr, wscales_ptr, factors_ptr, scales_ptr, wide_ptr, slots_ptr, N, width, wide,
            wide_bits, high, GROUPS, BN, BG,
        )  # fmt: skip


def packed_inputs(k: int) -> int:
    """K': codes of a row."""
    return cdiv(k, GROUP) * GROUP


def prepare(
    x: Tensor, tokens: tuple, wsteps: Tensor | None, wzeros: Tensor | None, wscales: Tensor | None, tables: tuple,
    groups: tuple[int, int], wide: tuple = (None, None, None),
) -> None:  # fmt: skip
    """Fill tokens (codes int8 [M, K'], scales float32 [M], sums int32 [M] or None) from x [M, K] (float of at most 32
    bits, columns contiguous), and tables (factors int32 [G, N] or None, scales float32 [G, N] or None).

    wsteps and wzeros int8 [N, G] or None, wscales [N, G] float; contiguous. groups: (N, G), G = 0 for no tables.
    wide: of rows of two widths the numbers int32 [w] of those of 8 bits, and room for what products.product_grouped
    takes: slots int32 [outputs] and counts `ready` int32 [>= M]. N counts stored rows, of which tables may have more;
    wscales are [outputs, G], and wzeros of the narrow ones alone.
    """
    width = groups[0] if tables[1] is None else tables[1].shape[1]
    launch = _plan(*x.shape, x.stride(0), *groups, width, 0 if wide[0] is None else len(wide[0]))
    launch(x, *tokens, wsteps, wzeros, wscales, *tables, *wide)


def factors(codes: Tensor, scale: Tensor, wsteps: Tensor, wzeros: Tensor | None, table: Tensor) -> None:
    """Fill the table of factors int32 [G, N] alone, where codes [M, K'] and scales [M] are there already."""
    n, groups = wsteps.shape
    launch = _plan(0, codes.shape[1], codes.stride(0), n, groups, n, 0)
    launch(codes, codes, scale, None, wsteps, wzeros, None, table, None, None, None, None)


@remembered
def _plan(m: int, k: int, stride: int, n: int, groups: int, width: int, wide: int) -> Launch:
    kp = packed_inputs(k)
    filled = next_power_of_2(kp)
    step = min(filled, 1024 if kp % 1024 == 0 or kp > 4096 else 512)  # 16 or 8 bytes of x a thread
    rows = min(max(1, 1024 // filled), next_power_of_2(max(m, 1)))
    programs = cdiv(m, rows)
    return Launch(
        _prepare_kernel, (programs + cdiv(width, BN) * cdiv(groups, BG),),
        M=m, K=k, KP=kp, stride_m=stride, N=n, width=width, wide=wide, wide_bits=wide.bit_length(),
        high=high_rows(wide), GROUPS=groups, token_programs=programs,
        ROWS=rows, STEP=step, STEPS=cdiv(kp, step), IN_REGISTERS=kp <= HELD, BN=BN, BG=BG, num_warps=4,
    )  # fmt: skip
