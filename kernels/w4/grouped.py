"""W4A8 with the scales after the sums: whole-number products of a group, and one multiplication for each output.

    y[m, n] = s_x[m] sum_g s[n, g] P[m, n, g]  +  b[n],    P[m, n, g] = sum_{k in g} q_x[m, k] (q[n, k] - z[n, g])

Codes q and zero points z lie in [-8, 7], so that the operand q - z has 5 bits and |P| <= 128 * 127 * 15 < 2^22: a
whole number that float32 has. No weight is rounded; its scales cost one multiply-add for each output and group, and
not one for each weight. Inputs are quantized symmetrically by token (tokens.py).

With one scale a row, whatever K is, the zero point moves out of the sum: P = sum_k q_x q - z sum_k q_x.

"MixPE: Quantization and Hardware Co-design for Efficient LLM Inference" (arXiv 2411.16158) puts the scale after the
group; its shift-and-add units are ptq4dm.hardware's, and no GPU's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.int4 import GROUP, unpack_int4
from ..runtime.ops import op
from . import int4_codes, integer
from .tokens import integer_product, token_codes


@op
def grouped_linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """x [..., K] float -> [..., N] in x's dtype.

    qweight: uint8 [N, K' / 2], contiguous, from `formats.int4.pack_int4(codes, 64)`, K' = K up to a multiple of 64,
    filled with codes 0. wscales [N, G] float, wzeros int8 [N, G] in [-8, 7] or None, G = 1 or K / 32, / 64 or / 128;
    bias [N] float or None.

    Raises ValueError for sizes that do not belong together.
    """
    int4_codes.check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    kernel = (
        integer.grouped_through if integer.known_to_serve(x.device) and rows.numel() and len(qweight) else reference
    )
    y = kernel(rows, qweight, wscales, wzeros, bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(qweight))


@grouped_linear.register_fake
def _(x, qweight, wscales, wzeros, bias):
    return x.new_empty(*x.shape[:-1], len(qweight))


def reference(x, qweight, wscales, wzeros, bias) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, on any device: the truth."""
    codes, scale = token_codes(x)
    groups, inputs = wscales.shape[1], x.shape[1]
    steps = unpack_int4(qweight, GROUP)[:, :inputs]
    steps = steps if wzeros is None else steps - wzeros.repeat_interleave(inputs // groups, 1)
    y = scaled_sums(codes, steps, wscales) * scale.double()[:, None]
    return (y if bias is None else y + bias.double()).float()


def scaled_sums(codes: Tensor, steps: Tensor, wscales: Tensor) -> Tensor:
    """sum_g s[n, g] P[m, n, g] of codes int8 [M, K], operands int8 [N, K] and scales [N, G]: float64 [M, N]."""
    total = codes.new_zeros(len(codes), len(steps), dtype=torch.float64)
    groups = wscales.shape[1]
    parts = zip(codes.chunk(groups, 1), steps.chunk(groups, 1), wscales.double().T, strict=True)
    for part, step, s in parts:
        total += integer_product(part, step) * s
    return total
