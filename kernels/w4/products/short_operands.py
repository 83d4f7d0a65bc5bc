"""Operands of product_short.py in Triton: weights, scales and inputs as the tensor cores take them.

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
def places(BLOCKS: tl.constexpr, WARPS: tl.constexpr):
    """Places of every lane's reads, in the order in which Triton deals them out: t, row and warp, each [reads]."""
    read = tl.arange(0, BLOCKS * WARPS * 32)
    return read % 4, read // (32 * WARPS) * 8 + read // 4 % 8, read // 32 % WARPS


@triton.jit
def _pairs(words, SHIFT: tl.constexpr, magic, dtype: tl.constexpr):
    """The codes at bits SHIFT and SHIFT + 16 of int32 words, with c, two in an int32.

    `magic`, MAGIC of dtype, is no literal: a bit operation with two literals is two.
    """
    place: tl.constexpr = 0 if dtype == tl.bfloat16 else 4  # the bit that is worth 1
    moved = words >> (SHIFT - place) if place <= SHIFT else words << (place - SHIFT)
    return moved & (0x000F000F << place) | magic


@triton.jit
def weights(words, magic, SHIFT: tl.constexpr, dtype: tl.constexpr, BN: tl.constexpr):
    """words [reads, 2] -> their codes at SHIFT and SHIFT + 8 [warps, BN, 32]."""
    return placed(_pairs(words, SHIFT, magic, dtype), _pairs(words, SHIFT + 8, magic, dtype), dtype, BN)


@triton.jit
def placed(bytes02, bytes13, dtype: tl.constexpr, BN: tl.constexpr):
    """Floats of 16 bits of bytes 0 and 2, and of 1 and 3, of words [reads, 2], two in an int32 -> [warps, BN, 32]."""
    byte0, byte2 = bytes02.to(tl.int16).to(dtype, bitcast=True), (bytes02 >> 16).to(tl.int16).to(dtype, bitcast=True)
    byte1, byte3 = bytes13.to(tl.int16).to(dtype, bitcast=True), (bytes13 >> 16).to(tl.int16).to(dtype, bitcast=True)
    codes = tl.join(tl.join(byte0, byte2), tl.join(byte1, byte3))
    warps: tl.constexpr = bytes02.shape[0] // (BN * 4)
    codes = tl.reshape(codes, (BN // 8, warps, 8, 4, 2, 2, 2))
    codes = tl.permute(codes, (1, 0, 2, 4, 3, 6, 5) if QUADS else (1, 0, 2, 4, 6, 3, 5))
    return tl.reshape(codes, (warps, BN, 32))


@triton.jit
def _inputs(x, dtype: tl.constexpr, BM: tl.constexpr):
    """x [reads, 8] -> [warps, 32, BM], inputs in the order of `weights`."""
    if x.dtype != dtype:
        x = x.to(tl.float32).to(dtype)  # GPUs before Hopper lack e4m3 to bf16
    warps: tl.constexpr = x.shape[0] // (BM * 4)
    x = tl.reshape(x, (BM // 8, warps, 8, 4, 2, 2, 2))
    x = tl.permute(x, (1, 4, 3, 6, 5, 0, 2) if QUADS else (1, 4, 6, 3, 5, 0, 2))
    return tl.reshape(x, (warps, 32, BM))


@triton.jit
def read_inputs(x, columns, end, dtype: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr):
    """Both halves of a group of each warp; zeros for groups past the end."""
    inputs = ()
    for half in tl.static_range(2):
        at = x + 32 * half
        values = tl.load(at) if EVEN else tl.load(at, mask=columns < end, other=0.0)
        inputs += (_inputs(values, dtype, BM),)
    return inputs
