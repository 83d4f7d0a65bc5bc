"""From floats to codes, value by value, in Triton: what the kernels that round share.

    code(v) = clamp(round(v)),   round to the nearest, or floor(v + noise),   noise as noise.py has it

NaN is coded as 0; the scale that goes with it is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..runtime.rounding import ROUND


@triton.jit
def bits_of(x):
    """The magnitudes of x as int32, in their order, NaN above all."""
    return tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def scale_of(top, limit, TINY: tl.constexpr):
    """The step of codes up to `limit` of values up to `top` float32; 1 where that would be no normal number."""
    return tl.where(top < TINY * limit, 1.0, tl.div_rn(top, limit))


@triton.jit
def code(v, noise, limit, NOISE: tl.constexpr):
    """v float32, NaN as 0 -> int32 in [-limit, limit]."""
    v = tl.where(v == v, v, 0.0)
    v = tl.minimum(tl.maximum(v, -1024.0), 1024.0)  # see runtime/rounding.py
    whole = tl.floor(v + noise) if NOISE else (v + ROUND) - ROUND
    return tl.minimum(tl.maximum(whole, -limit), limit).to(tl.int32)


@triton.jit
def mix(x, ONE: tl.constexpr, TWO: tl.constexpr):
    """mix of noise.py."""
    x = (x ^ (x >> 16)) * ONE
    x = (x ^ (x >> 15)) * TWO
    return x ^ (x >> 16)


@triton.jit
def noise_at(at, seed_ptr, ONE: tl.constexpr, TWO: tl.constexpr):
    """float32 in (0, 1) for the values with these numbers."""
    seed = tl.load(seed_ptr)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first = mix(low + mix(high, ONE, TWO), ONE, TWO)
    second = mix(first + high, ONE, TWO)
    bits = mix(mix(at.to(tl.uint32) ^ first, ONE, TWO) + second, ONE, TWO) >> 16
    return (bits.to(tl.float32) + 0.5) * 0.0000152587890625
