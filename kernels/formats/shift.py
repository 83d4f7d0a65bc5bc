"""ShiftQuant: codes of b bits whose steps are powers of two apart, so that an ordinary integer product sums them.

    x[r, p, c] ~ s 2^-(h[r] + g[c]) q[r, p, c],    |q| <= 2^(b-1) - 1,    h, g in 0 .. G-1

A row is a sample (or an output of a weight), a column a channel, p runs over pixels, tokens or taps. A product that
sums over columns takes q << (G-1 - g), which is whole and fits in 8 bits where b + G <= 9; the rows' steps come after
it. One that sums over rows takes q << (G-1 - h), and the columns' steps come after it. So one rounding of a tensor
serves both products that it is in, and no row or column is moved: no memory is rearranged.

"Towards Accurate and Efficient Sub-8-Bit Integer Training" (arXiv:2411.10948) groups along the contraction alone.
Our assumptions, where its text says no more: the thresholds are powers of two of the largest value, which no group
passes (a larger exponent would clip); groups on both sides, rows first; G = 4, or what b + G <= 9 leaves. G = 1 is
one scale a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .int8 import weight_limit

MOST = 9
"""Bits and groups together: (2^(b-1) - 1) 2^(G-1) <= 127."""
TERMS = 2**31 // 127**2
"""So many products of two codes, shifted or not, never pass an int32."""


class ShiftCodes(NamedTuple):
    """A tensor [R, P, C] in codes: codes int8, scale [] float32, rows [R] and columns [C] int8 (h and g above)."""

    codes: Tensor
    scale: Tensor
    rows: Tensor
    columns: Tensor
    groups: int


def groups_of(bits: int, groups: int) -> int:
    """`groups`, or as many as go with codes of so many bits."""
    return min(groups, MOST - bits)


def encode(x: Tensor, bits: int, groups: int, noise: Tensor | None = None) -> ShiftCodes:
    """Codes of x [R, P, C] float.

    noise: uniform in [0, 1), of x's shape: stochastic rounding, whose mean is x. None: to the nearest. What is not
    finite makes the scale so, and with it every product.

    Raises ValueError where b + G > 9.
    """
    if bits + groups > MOST:
        raise ValueError(f"codes of {bits} bits have at most {MOST - bits} groups, not {groups}.")
    limit = weight_limit(bits)
    # of the magnitude; where there are many pixels, quicker than through x.abs()
    peaks = x[:, 0].abs() if x.shape[1] == 1 else torch.maximum(x.amax(1), -x.amin(1))
    peaks = peaks.float()
    largest = peaks.amax()
    rows = _exponents(largest, peaks.amax(1), groups)
    columns = _exponents(largest, (peaks * powers(rows)[:, None]).amax(0), groups)
    scale = torch.where(largest < torch.finfo(torch.float32).tiny * limit, 1.0, largest / limit)
    steps = x * (powers(rows)[:, None] * powers(columns) * (1.0 / scale))[:, None]
    steps = steps.round_() if noise is None else steps.add_(noise).floor_()
    return ShiftCodes(steps.clamp_(-limit, limit).to(torch.int8), scale, rows, columns, groups)


def decode(shifted: ShiftCodes) -> Tensor:
    """The values of codes, float32 [R, P, C]."""
    return shifted.codes.float() * row_steps(shifted)[:, None, None] * powers(-shifted.columns)


def across_columns(shifted: ShiftCodes) -> Tensor:
    """int8 [R, P, C] for a product that sums over columns: q << (G-1 - g)."""
    return shifted.codes << (shifted.groups - 1 - shifted.columns)


def across_rows(shifted: ShiftCodes) -> Tensor:
    """int8 [R, P, C] for a product that sums over rows: q << (G-1 - h)."""
    return shifted.codes << (shifted.groups - 1 - shifted.rows)[:, None, None]


def row_steps(shifted: ShiftCodes) -> Tensor:
    """What each row's sums are worth, but for the other operand and the columns: s 2^-h, float32 [R]."""
    return shifted.scale * powers(-shifted.rows)


def column_steps(shifted: ShiftCodes) -> Tensor:
    """The same of each column: s 2^-g, float32 [C]."""
    return shifted.scale * powers(-shifted.columns)


def shift_step(groups: int) -> float:
    """What a shifted code's unit is in unshifted ones: 2^-(G-1)."""
    return 2.0 ** (1 - groups)


def powers(exponents: Tensor) -> Tensor:
    """2^e, float32, exact."""
    return torch.exp2(exponents.float())


def _exponents(largest: Tensor, peaks: Tensor, groups: int) -> Tensor:
    """The largest e <= G-1 with peak 2^e <= largest, int8. (By comparisons, which are exact; logarithms are not.)"""
    found = torch.zeros(peaks.shape, dtype=torch.int8, device=peaks.device)
    for e in range(1, groups):
        found += peaks * 2.0**e <= largest
    return found
