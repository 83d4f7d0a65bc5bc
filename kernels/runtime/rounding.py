"""Rounding in Triton: to the nearest integer, halves to the even one, as torch.round does."""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 to nearest even. Clamp v before, lest the product that made
v and this sum become one fused operation, which rounds once where torch rounds twice."""


@triton.jit
def to_codes(v, dtype: tl.constexpr):
    """v float32 -> the nearest e4m3, or the nearest whole number as int8 (the low byte of a float of 2^23's ulp)."""
    if dtype == tl.int8:
        return (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    return v.to(dtype)
