"""Tokens in 8 bits, and exact sums of products of 8-bit codes: what W4A8 products in integers share.

    s_x[m] = max_k |x[m, k]| / 127  (1 for a row of zeros),    q_x[m, k] = round(x[m, k] * (1 / s_x[m]))

A row that holds NaN or infinity has no codes: its scale is NaN or infinity, and its outputs are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.int8 import dynamic_scale, quantize_activation

EXACT = 1 << 10  # inputs whose sum of products of int8 codes is below 2^24, where float32 has every whole number


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> int8 codes [M, K] and float32 scales [M]: the formula, on any device."""
    scale = dynamic_scale(x, (1,))
    return quantize_activation(x, scale, torch.zeros_like(scale)), scale[:, 0]


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 [M, K], weight int8 [N, K] -> codes weight^T [M, N], exact whole numbers in float64.

    Products of floats, a part of K at a time that float32 sums without rounding: there is no product of int8 matrices
    on every device.
    """
    total = codes.new_zeros(len(codes), len(weight), dtype=torch.float64)
    for part, columns in zip(codes.split(EXACT, 1), weight.split(EXACT, 1), strict=True):
        total += part.float() @ columns.float().T
    return total
