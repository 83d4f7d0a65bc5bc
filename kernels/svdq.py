"""A 4-bit linear layer with a low-rank branch (SVDQuant, arXiv:2411.05007, eq. 6):

    y = Q_a((x + c) / s) Q_w(R)^T + (x D^T) U^T + b

    x [M, K]   c a constant that lifts the outputs of GELU or SiLU above 0, or 0
    s [K]      smoothing divisors             R = W diag(s) - U D diag(s), the residual of the smoothed weight
    Q_w        4-bit codes in groups of G     D [r, K], U [N, r] the branch; it reads x itself
    Q_a        per token and group "int4" (unsigned where c > 0); per token "int8" or "fp8" (e4m3); or "none"

What c adds is in b. The torch reference here is the truth: it multiplies the dequantized codes in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import fp8
from .int4 import dequantize_groups, quantize_activation_groups, unpack_int4
from .int8 import dynamic_scale

ACTIVATIONS = ("int4", "int8", "fp8", "none")


def svdq_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    activation: str,
    shift: float = 0.0,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight uint8 [N, K/2] as `int4.pack_int4` has it, wscales [N, K/G], smooth [K], down [r, K], up [N, r], bias [N];
    any float dtypes. Without a branch down and up are None, without smoothing smooth is.
    """
    exact = x.float()
    inputs = exact + shift if shift else exact
    inputs = inputs if smooth is None else inputs / smooth.float()
    group_size = 2 * qweight.shape[1] // wscales.shape[1]
    weight = dequantize_groups(unpack_int4(qweight, group_size), wscales)
    y = F.linear(round_activation(inputs, activation, group_size, bool(shift)), weight)
    if down is not None:
        y = y + F.linear(F.linear(exact, down.float()), up.float())
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def round_activation(x: Tensor, activation: str, group_size: int, unsigned: bool) -> Tensor:
    """x [..., K] float32 -> the values that its codes stand for, float32."""
    if activation == "none":
        return x
    if activation == "int4":
        return dequantize_groups(*quantize_activation_groups(x, group_size, unsigned))
    if activation == "int8":
        scale = dynamic_scale(x, (-1,))
        return torch.round(x / scale) * scale
    scale = fp8.scale_of(x, (-1,))
    return (x / scale).to(fp8.DTYPE).float() * scale
