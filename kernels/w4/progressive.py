"""Progressive 4-bit weights: 8 bits a row, and of those 4 bits in groups, by whole-number steps. The W4A8 of QServe.

    w[n, k] ~ s0[n] w8[n, k],    w8[n, k] = s1[n, g] (q[n, k] - z[n, g])
    y[m, n] = s_x[m] s0[n] sum_k q_x[m, k] w8[n, k]  +  b[n]

q and z lie in [-8, 7], the steps s1 are int8 in 1..16, s0 is float32. w8 is an int8 without rounding: the sums are
those of an 8-bit product, whole numbers, while the weight in memory has 4 bits. Where s0 = max|w| / 119 and s1, z are
found from the 8-bit codes of that, |w8| <= 127; w8 is the caller's to keep in [-128, 127], that of codes 0 which fill
up a row too. Inputs are quantized symmetrically by token (tokens.py). The kernel makes w8 in its main loop:
products/product_progressive.py.

Lin et al., "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving" (arXiv 2405.04532), 4.1.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.int4 import GROUP, unpack_int4
from ..formats.progressive import operand
from ..runtime.late import late
from ..runtime.ops import op
from . import int4_codes, integer
from .tokens import integer_product, token_codes

if TYPE_CHECKING:
    from . import progressive_triton
else:
    late(globals(), "progressive_triton")


@op
def progressive_codes(qweight: Tensor, wsteps: Tensor, wzeros: Tensor | None, inputs: int) -> Tensor:
    """w8, int8 [N, K], K = inputs.

    qweight: uint8 [N, K' / 2], contiguous, from `formats.int4.pack_int4(codes, 64)`, K' = K up to a multiple of 64,
    filled with codes 0. wsteps int8 [N, G], wzeros int8 [N, G] or None, G = 1 or K / 32, / 64 or / 128. What leaves
    int8 comes back from its other end.

    Raises ValueError for sizes that do not belong together, and for steps that are not int8.
    """
    check(qweight.shape, wsteps.shape, wsteps.dtype, None if wzeros is None else wzeros.shape, inputs)
    if qweight.is_cuda and qweight.shape[0]:
        codes = qweight.new_empty(len(qweight), inputs, dtype=torch.int8)
        progressive_triton.codes(qweight, wsteps, wzeros, wsteps.shape[1], inputs, codes)
        return codes
    return reference_codes(qweight, wsteps, wzeros, inputs)


@progressive_codes.register_fake
def _(qweight, wsteps, wzeros, inputs):
    return qweight.new_empty(len(qweight), inputs, dtype=torch.int8)


@op
def progressive_linear(
    x: Tensor, qweight: Tensor, wsteps: Tensor, wzeros: Tensor | None, wscales: Tensor, bias: Tensor | None
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    wscales: s0, float32 [N]; bias [N] float or None; the rest, and ValueError, as in `progressive_codes`.
    """
    check(qweight.shape, wsteps.shape, wsteps.dtype, None if wzeros is None else wzeros.shape, x.shape[-1])
    if wscales.shape != qweight.shape[:1]:
        raise ValueError(f"scales of the rows are [N] with N = {len(qweight)}; got {list(wscales.shape)}.")
    rows = x.reshape(-1, x.shape[-1])
    kernel = (
        integer.progressive_through
        if integer.known_to_serve(x.device) and rows.numel() and len(qweight)
        else reference
    )
    y = kernel(rows, qweight, wsteps, wzeros, wscales, bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(qweight))


@progressive_linear.register_fake
def _(x, qweight, wsteps, wzeros, wscales, bias):
    return x.new_empty(*x.shape[:-1], len(qweight))


@functools.lru_cache(maxsize=4096)
def check(
    qweight: torch.Size, wsteps: torch.Size, dtype: torch.dtype, wzeros: torch.Size | None, inputs: int
) -> None:  # fmt: skip
    """Raise ValueError for what does not belong together; right ones are looked at once."""
    int4_codes.check(qweight, wsteps, wzeros, inputs)
    if dtype != torch.int8:
        raise ValueError(f"steps of a progressive weight are whole numbers in int8, not {dtype}.")


def reference_codes(qweight: Tensor, wsteps: Tensor, wzeros: Tensor | None, inputs: int) -> Tensor:
    """w8 by its formula, on any device."""
    return operand(unpack_int4(qweight, GROUP)[:, :inputs], wsteps, wzeros)


def reference(x, qweight, wsteps, wzeros, wscales, bias) -> Tensor:
    """x [M, K] float -> float32 [M, N] by the formula, on any device: the truth."""
    return reference_product(*token_codes(x), qweight, wsteps, wzeros, wscales, bias)


def reference_product(codes, scale, qweight, wsteps, wzeros, wscales, bias) -> Tensor:
    """The same from codes int8 [M, K] and scales [M]."""
    total = integer_product(codes, reference_codes(qweight, wsteps, wzeros, codes.shape[1]))
    y = total * (scale.double()[:, None] * wscales.double())
    return (y if bias is None else y + bias.double()).float()
