"""A layer with progressive weights in two ops, for layers that share an input (formulas: progressive.py):

    w4a8_tokens           x -> int8 codes and scales            once for all layers that read x
    progressive_product   codes, scales -> y                    once for each of them

Together they give the bits of `progressive_linear`. On devices without kernels both are the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.int4 import GROUP
from ..formats.nonlinearities import NONLINEARITIES, check
from ..runtime.ops import op
from ..runtime.prepared import prepared
from . import integer, progressive
from .tokens import token_codes


@op
def w4a8_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] float -> int8 codes [M, K'], K' = K up to a multiple of 64, filled with 0, and float32 scales [M]."""
    if integer.known_to_serve(x.device) and x.numel():
        return integer.tokens_through(x)
    codes, scale = token_codes(x)
    return F.pad(codes, (0, -codes.shape[1] % GROUP)), scale


@w4a8_tokens.register_fake
def _(x):
    wide = -(-x.shape[1] // GROUP) * GROUP
    return x.new_empty(x.shape[0], wide, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@op
def progressive_product(
    codes: Tensor,
    scale: Tensor,
    qweight: Tensor,
    wsteps: Tensor,
    wzeros: Tensor | None,
    wscales: Tensor,
    bias: Tensor | None,
    inputs: int,
    dtype: torch.dtype,
    nonlinearity: str = "",
) -> Tensor:
    """Outputs [M, N] of dtype from codes [M, K'] and scales [M]; K = inputs, the rest as in `progressive_linear`.

    wscales may be of any float type. nonlinearity: "", "gelu", "gelu_tanh" or "silu", of float32.

    Raises ValueError for sizes that do not belong together, and for another nonlinearity.
    """
    check(nonlinearity)
    progressive.check(qweight.shape, wsteps.shape, wsteps.dtype, None if wzeros is None else wzeros.shape, inputs)
    if codes.shape[1] != 2 * qweight.shape[1] or scale.shape != codes.shape[:1]:
        raise ValueError(
            f"codes {list(codes.shape)} and their scales {list(scale.shape)} are not of a layer with {inputs} inputs."
        )
    if wscales.dtype != torch.float32:
        wscales = prepared(wscales, torch.float32, wscales.float)  # once
    operands = (qweight, wsteps, wzeros, wscales, bias)
    if integer.known_to_serve(codes.device) and codes.numel() and len(qweight):
        return integer.progressive_of_tokens(codes, scale, *operands, inputs, dtype, nonlinearity)
    y = progressive.reference_product(codes[:, :inputs], scale, *operands)
    return NONLINEARITIES[nonlinearity](y).to(dtype)


@progressive_product.register_fake
def _(codes, scale, qweight, wsteps, wzeros, wscales, bias, inputs, dtype, nonlinearity=""):
    return codes.new_empty(codes.shape[0], qweight.shape[0], dtype=dtype)
