"""Operands of w4a16.py in Triton: weights, scales and inputs as the tensor cores take them.

Codes go from memory to the tensor cores through registers alone. In a product of [16, 16] by [16, 8], lane 4 r + t of
a warp holds rows r and r + 8 of the first operand and column r of the second, and of both the same 4 of the 16
inputs; which 4, nobody asks. So lane 4 r + t reads bytes 8 t .. 8 t + 7 of a group of row r, which are its inputs
8 t .. 8 t + 7 and 32 + 8 t .. 39 + 8 t, and the same inputs of row r of x. Reads are numbered along one axis, which
Triton deals to the lanes of a warp, then to the warps, then around again.

A code is set into the mantissa of 128 (bf16) or 64 (fp16) by bit operations that serve two codes at once: those of
bytes 0 and 2 of a word of 8 codes, or 1 and 3. It comes out as q + c with c = 136 or 72.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of 16 inputs of a product Triton up to 3.7 gives a lane 4 in a row, later versions two pairs 8 apart. Results do not
# depend on it, only whether values have to be handed from lane to lane.
QUADS = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8))
MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x54005400}  # 128 or 64, twice


@triton.jit
def places(BLOCKS: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr):
    """Of every lane's reads, in the order in which Triton deals them out: t, row and group, each [reads]."""
    read = tl.arange(0, BLOCKS * RUN * WARPS * 32)
    t, r = read % 4, read // 4 % 8
    group = read // 32 % WARPS * RUN + read // (32 * WARPS) % RUN
    return t, read // (32 * WARPS * RUN) * 8 + r, group


@triton.jit
def read_run(q, wscales, row, groups, rows, runs, i: tl.constexpr, left, end, EVEN: tl.constexpr):
    """(words [reads, 2], pairs of scales) of a run of each warp, i groups after its first; `left` rows are there.

    Scales are read in twos: where 16 bits are read to be used much later, compilers wait for them to pack two.
    """
    words = tl.load(q + i * 8, mask=row < left if EVEN else (row < left) & (groups + i < end))
    pairs = tl.load(wscales + i // 2, mask=rows < left if EVEN else (rows < left) & (runs + i < end), other=0)
    return words, pairs


@triton.jit
def scales_of(pairs, at, dtype: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr):
    """Pairs of scales, of which those from place `at` on are meant -> [RUN, warps, BN / 8, 8, 1, 4, 1]."""
    if RUN == 1:
        scales = (pairs >> (at & 1) * 16).to(tl.int16)
    else:
        scales = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    scales = tl.reshape(scales.to(dtype, bitcast=True).to(tl.float32), (BN // 8, WARPS, 8, 4, RUN))
    return tl.permute(scales, (4, 1, 0, 2, 3))[:, :, :, :, None, :, None]


@triton.jit
def _pairs(words, SHIFT: tl.constexpr, magic, dtype: tl.constexpr):
    """The codes at bits SHIFT and SHIFT + 16 of int32 words, with c.

    `magic`, MAGIC of dtype, is no literal: a bit operation with two literals is two.
    """
    place: tl.constexpr = 0 if dtype == tl.bfloat16 else 4  # the bit that is worth 1
    moved = words >> (SHIFT - place) if place <= SHIFT else words << (place - SHIFT)
    bits = moved & (0x000F000F << place) | magic
    return bits.to(tl.int16).to(dtype, bitcast=True), (bits >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def weights(words, magic, SHIFT: tl.constexpr, dtype: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr):
    """words [reads, 2] -> their codes at SHIFT and SHIFT + 8 [RUN * warps, BN, 32]."""
    byte0, byte2 = _pairs(words, SHIFT, magic, dtype)
    byte1, byte3 = _pairs(words, SHIFT + 8, magic, dtype)
    codes = tl.join(tl.join(byte0, byte2), tl.join(byte1, byte3))
    warps: tl.constexpr = words.shape[0] // (BN * RUN * 4)
    codes = tl.reshape(codes, (BN // 8, RUN, warps, 8, 4, 2, 2, 2))
    codes = tl.permute(codes, (1, 2, 0, 3, 5, 4, 7, 6) if QUADS else (1, 2, 0, 3, 5, 7, 4, 6))
    return tl.reshape(codes, (RUN * warps, BN, 32))


@triton.jit
def _inputs(x, dtype: tl.constexpr, BM: tl.constexpr, RUN: tl.constexpr):
    """x [reads, 8] -> [RUN * warps, 32, BM], inputs in the order of `weights`."""
    if x.dtype != dtype:
        x = x.to(tl.float32).to(dtype)  # GPUs before Hopper lack e4m3 to bf16
    warps: tl.constexpr = x.shape[0] // (BM * RUN * 4)
    x = tl.reshape(x, (BM // 8, RUN, warps, 8, 4, 2, 2, 2))
    x = tl.permute(x, (1, 2, 5, 4, 7, 6, 0, 3) if QUADS else (1, 2, 5, 7, 4, 6, 0, 3))
    return tl.reshape(x, (RUN * warps, 32, BM))


@triton.jit
def read_inputs(
    x, columns, end, dtype: tl.constexpr, STEP: tl.constexpr, RUNS: tl.constexpr, BM: tl.constexpr,
    RUN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Both halves of the groups of all runs; zeros for groups past the end."""
    inputs = ()
    for i in tl.static_range(RUNS):
        for half in tl.static_range(2):
            at = x + i * STEP * 64 + 32 * half
            values = tl.load(at) if EVEN else tl.load(at, mask=columns + i * STEP < end, other=0.0)
            inputs += (_inputs(values, dtype, BM, RUN),)
    return inputs


@triton.jit
def excess_of(inputs, dtype: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr):
    """-c sum_k x[m, k] of every group [RUN * warps, BN, BM], to be added to each product."""
    batch: tl.constexpr = inputs[0].shape[0]
    BM: tl.constexpr = inputs[0].shape[2]
    half_c = tl.full((batch, 16, 16), -68.0 if dtype == tl.bfloat16 else -36.0, dtype)
    # joined as weights are, lest lanes hold x in two orders
    half_c = tl.reshape(tl.join(half_c, half_c), (batch, 16, 32))
    sums = ()
    for i in tl.static_range(RUNS):
        part = tl.zeros((batch, 16, BM), tl.float32)
        for half in tl.static_range(2):
            part = tl.dot(half_c, inputs[2 * i + half], part)
        # all rows are alike: two of a lane are added and stand for all, so that they take few registers
        part = tl.sum(tl.reshape(part, (batch, 2, 8, BM)), 1)
        part = tl.broadcast_to(part[:, None, :, :], (batch, BN // 8, 8, BM))
        sums += (tl.reshape(part, (batch, BN, BM)),)
    return sums
