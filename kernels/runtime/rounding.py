"""Rounding in Triton: to the nearest integer, halves to the even one, as torch.round does."""

from __future__ import annotations

import triton.language as tl

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds |v| < 2^22 to nearest even. Clamp v before, lest the product that made
v and this sum become one fused operation, which rounds once where torch rounds twice."""
