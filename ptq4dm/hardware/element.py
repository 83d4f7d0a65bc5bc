"""Products without a multiplier: an activation times a 4-bit weight, by shifts and adds over its bits (MixPE).

    signed w = -8 b3 + 4 b2 + 2 b1 + b0          x w = -(x << 3) b3 + (x << 2) b2 + (x << 1) b1 + x b0
    unsigned q = 8 b3 + 4 b2 + 2 b1 + b0, zero z  x (q - z) = x q - x z, and over a group sum(x q) - z sum(x)
    floating x = m 2^e                           x w = (-(m << 3) b3 + (m << 2) b2 + (m << 1) b1 + m b0) 2^e

MixPE (Zhang et al., 2024, arXiv 2411.16158), sections on the processing element and on dequantization. These
functions say what the hardware computes, bit by bit; they are not fast, and no GPU kernel works so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

BITS = 4
GROUP = 128
MOST_SUM = 1 << 22
"""What the magnitude of a group's partial sum stays below: the accumulator of a group needs 23 bits with its sign."""


def shift_add(x: Tensor, weight: Tensor, signed: bool = True) -> Tensor:
    """Products x * weight, int32, made of shifts and adds alone; the two are broadcast.

    x: int8. weight: integers, in [-8, 7] (two's complement: the top bit counts -8), or if not `signed` in [0, 15].

    Raises:
        UserError: x is not int8, or a weight has more than 4 bits.
    """
    if x.dtype != torch.int8:
        raise UserError(f"shift_add takes int8 activations, not {str(x.dtype).removeprefix('torch.')}.")
    return _over_bits(x.int(), weight, signed)


def shift_add_float(x: Tensor, weight: Tensor, signed: bool = True) -> Tensor:
    """Products x * weight, float32: the significand goes through shifts and adds, the exponent is put back.

    x: float16, all finite. weight as in `shift_add`. Exact: 11 + 4 bits fit a float32, and so does every exponent.

    Raises:
        UserError: x is not float16 or not finite, or a weight has more than 4 bits.
    """
    if x.dtype != torch.float16:
        raise UserError(f"shift_add_float takes float16 activations, not {str(x.dtype).removeprefix('torch.')}.")
    if not bool(x.isfinite().all()):
        raise UserError("shift_add_float: an activation is NaN or infinite, which has no significand.")
    bits = x.view(torch.int16).int()
    exponent, fraction = bits >> 10 & 31, bits & 1023
    normal = exponent > 0
    significand = torch.where(normal, fraction | 1024, fraction)  # the hidden one; subnormal numbers have none
    significand = torch.where(bits < 0, -significand, significand)
    power = torch.where(normal, exponent, torch.ones_like(exponent)) - 25  # 15 of the bias, 10 of the fraction
    product = _over_bits(significand, weight, signed)
    return torch.ldexp(product.float(), power)


def _over_bits(x: Tensor, weight: Tensor, signed: bool) -> Tensor:
    low, high = (-8, 7) if signed else (0, 15)
    if weight.is_floating_point() or (weight.numel() and (int(weight.min()) < low or int(weight.max()) > high)):
        raise UserError(f"a 4-bit weight is a whole number from {low} to {high}.")
    code = weight.int() & 15
    total = torch.zeros(torch.broadcast_shapes(x.shape, weight.shape), dtype=torch.int32)
    for place in range(BITS):
        term = torch.where((code >> place & 1).bool(), x << place, 0)  # an AND with the weight's bit
        total = total - term if signed and place == BITS - 1 else total + term
    return total


def group_product(
    x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor, input_scale: Tensor, group: int = GROUP
) -> Tensor:
    """Y [M, N] float64 of quantized operands, dequantized after each group's product.

        P[m, n, g] = sum_{k in g} x[m, k] codes[n, k] - zeros[n, g] sum_{k in g} x[m, k]
        Y[m, n] = input_scale[m] sum_g scales[n, g] P[m, n, g]

    One multiplication by a scale for each output and group, not one for each weight and use.

    x: int8 [M, K]. codes: [N, K] in [0, 15]. zeros: [N, K / group] in [0, 15]. scales: [N, K / group].
    input_scale: [M].

    Raises:
        UserError: shapes that do not fit, or codes and zeros of more than 4 bits.
    """
    sums = partial_sums(x, codes, zeros, group)
    return input_scale.double()[:, None] * (sums.double() * scales.double()).sum(-1)


def partial_sums(x: Tensor, codes: Tensor, zeros: Tensor, group: int = GROUP) -> Tensor:
    """P [M, N, G] int32 of `group_product`, each magnitude below MOST_SUM for groups of 128 and less."""
    if x.shape[1] % group or codes.shape[1] != x.shape[1] or zeros.shape != (len(codes), x.shape[1] // group):
        raise UserError(
            f"inputs {list(x.shape)}, codes {list(codes.shape)} and zeros {list(zeros.shape)} do not fit "
            f"groups of {group}."
        )
    if not 1 <= group <= GROUP:
        raise UserError(f"the accumulator of a group is made for 1 to {GROUP} inputs, not {group}.")
    m, n, groups = len(x), len(codes), x.shape[1] // group
    products = shift_add(x[:, None, :], codes[None], signed=False)
    zero_terms = shift_add(x[:, None, :], zeros.repeat_interleave(group, 1)[None], signed=False)
    sums = (products - zero_terms).view(m, n, groups, group).sum(-1, dtype=torch.int32)
    assert not sums.numel() or int(sums.abs().max()) < MOST_SUM
    return sums
