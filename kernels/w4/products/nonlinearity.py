"""Functions that may follow a product, on its float32 sums before they are stored, in Triton and Gluon.

    silu        y / (1 + e^-y)
    gelu        y (1 + erf(y / sqrt 2)) / 2 = max(y, 0) - |y| erfc(z) / 2,    z = |y| / sqrt 2
    gelu_tanh   y (1 + tanh u) / 2 = y / (1 + e^-2u),    u = sqrt(2 / pi) (y + 0.044715 y^3)

with erfc(z) = (a1 t + ... + a5 t^5) e^(-z^2), t = 1 / (1 + 0.3275911 z) (Abramowitz and Stegun, 7.1.26).
No branches, two slow instructions each. PTX's tanh.approx would be one, but is off by 2^-11 of 1, which is a fifth of
what is left of y = -3. These are within 3e-7 |y| of the exact values, and nearer than bf16's rounding until those are
below 1e-5 (gelu; the others until 1e-7).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _erfc(z):
    """z >= 0."""
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return series * tl.exp2(-1.4426950408889634 * z * z)


@triton.jit
def nonlinear(y, KIND: tl.constexpr):
    """y float32; KIND: "" leaves it as it is."""
    if KIND == "silu":
        y = y / (1.0 + tl.exp2(-1.4426950408889634 * y))
    elif KIND == "gelu":
        y = tl.maximum(y, 0.0) - 0.5 * tl.abs(y) * _erfc(0.7071067811865476 * tl.abs(y))
    elif KIND == "gelu_tanh":  # 2 sqrt(2 / pi) log2(e), and that times 0.044715
        y = y / (1.0 + tl.exp2(y * (-2.302208198144325 - 0.1029432395800235 * (y * y))))
    else:
        tl.static_assert(KIND == "")
    return y
