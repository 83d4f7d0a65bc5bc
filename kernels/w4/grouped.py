"""W4A8 with the scales after the sums: whole-number products of a group, and one multiplication for each output.

    y[m, n] = s_x[m] sum_g s[n, g] P[m, n, g]  +  b[n],    P[m, n, g] = sum_{k in g} q_x[m, k] (q[n, k] - z[n, g])

Codes q and zero points z lie in [-8, 7], so that the operand q - z has 5 bits and |P| <= 128 * 127 * 15 < 2^22: a
whole number that float32 has. No weight is rounded; its scales cost one multiply-add for each output and group, and
not one for each weight. Inputs are quantized symmetrically by token (tokens.py).

Of a codebook (formats/codebook.py) the operand is an int8 level t[q] in the place of q - z: |P| <= 128 * 127 * 127.

With one scale a row, whatever K is, the zero point moves out of the sum: P = sum_k q_x q - z sum_k q_x.

"MixPE: Quantization and Hardware Co-design for Efficient LLM Inference" (arXiv 2411.16158) puts the scale after the
group; its shift-and-add units are ptq4dm.hardware's, and no GPU's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.ops import op
from . import int4_codes, integer
from .tokens import integer_product, token_codes


@op
def grouped_linear(
    x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, bias: Tensor | None,
    levels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] float -> [..., N] in x's dtype.

    qweight: uint8 [N, K' / 2], contiguous, from `formats.int4.pack_int4(codes, 64)`, K' = K up to a multiple of 64,
    filled with codes 0. wscales [N, G] float, wzeros int8 [N, G] in [-8, 7] or None, G = 1 or K / 32, / 64 or / 128;
    bias [N] float or None; levels: int8 [1, 16] or [N, 16] of a codebook, which has no zero points, or None.

    Raises ValueError for sizes that do not belong together.
    """
    int4_codes.check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, x.shape[-1])
    int4_codes.check_levels(qweight, wzeros, levels)
    rows = x.reshape(-1, x.shape[-1])
    served = integer.known_to_serve(x.device) and rows.numel() and len(qweight)
    kernel = integer.grouped_through if served else reference
    y = kernel(rows, qweight, wscales, wzeros, bias, levels=levels)
    return y.to(x.dtype).view(*x.shape[:-1], len(qweight))


@grouped_linear.register_fake
def _(x, qweight, wscales, wzeros, bias, levels=None):
    return x.new_empty(*x.shape[:-1], len(qweight))


def reference(x, qweight, wscales, wzeros, bias, levels=None) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, on any device: the truth."""
    codes, scale = token_codes(x)
    steps = int4_codes.steps_of(qweight, wzeros, levels, x.shape[1], wscales.shape[1]).flatten(1)
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
