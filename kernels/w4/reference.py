"""A 4-bit linear layer with a low-rank branch (SVDQuant, arXiv:2411.05007, eq. 6):

    y = f(Q_a((x + c) / s) Q_w(R)^T + (x D^T) U^T + b)

    x [M, K]   c a constant that lifts the outputs of GELU or SiLU above 0, or 0
    s [K]      smoothing divisors             R = W diag(s) - U D diag(s), the residual of the smoothed weight
    Q_w        4-bit codes in groups of G     D [r, K], U [N, r] the branch; it reads x itself
    Q_a        per token and group "int4" (unsigned where c > 0); per token "int8" or "fp8" (e4m3); or "none"
    f          the nonlinearity that follows the layer, "gelu", "gelu_tanh" or "silu", or "" for none

In Q_a x may be rotated first, x H, for a weight W H; and what a branch of orthonormal D holds may be left out of it,
x - (x D^T) D. The branch reads x as it comes in either case.

What c adds is in b. The torch reference here is the truth: it multiplies the dequantized codes in float32. `codes`
and `product` are its two halves, for layers that share an input and for inputs that come from a norm:

    x[b, t] = LayerNorm(h[b, t]) (1 + n[b]) + m[b]          "adaptive" layer norm (DiT, arXiv:2212.09748)
    x[b, t] = LayerNorm(h[b, t]) n[b] + m[b]                "layer": a norm with weights, or what is made of them
    x[b, t] = RMSNorm(h[b, t]) n[b] + m[b]                  "rms" (arXiv:1910.07467)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import fp8
from ..formats.int4 import GROUP, dequantize_groups, quantize_activation_groups, unpack_int4
from ..formats.int8 import dynamic_scale
from ..formats.nonlinearities import NONLINEARITIES
from ..formats.rotation import rotate
from ..runtime.gradient import without_gradient

NORMS = ("adaptive", "layer", "rms")
ACTIVATIONS = ("int4", "int8", "fp8", "none")


@without_gradient
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
    nonlinearity: str = "",
    rotation: int = 0,
    rotation_kind: str = "regular",
    left_out: Tensor | None = None,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight uint8 [N, K/2] as `int4.pack_int4` has it, wscales [N, K/G], smooth [K], down [r, K], up [N, r], bias [N];
    any float dtypes. Without a branch down and up are None, without smoothing smooth is. rotation: the group of
    inputs that is rotated, 0 for none; left_out: D [r, K], orthonormal rows that are taken out of what is rounded.
    All by position.
    RuntimeError in a backward pass.
    """
    exact = x.float()
    rest = exact if left_out is None else exact - F.linear(F.linear(exact, left_out.float()), left_out.float().T)
    inputs = _smoothed(turned(rest, rotation, rotation_kind), smooth, shift)
    group_size = 2 * qweight.shape[1] // wscales.shape[1]
    weight = dequantize_groups(unpack_int4(qweight, group_size), wscales)
    y = F.linear(round_activation(inputs, activation, group_size, bool(shift)), weight)
    if down is not None:
        y = y + F.linear(F.linear(exact, down.float()), up.float())
    if bias is not None:
        y = y + bias.float()
    return nonlinear(y, nonlinearity).to(x.dtype)


def codes(
    x: Tensor, more: Tensor | None, smooth: Tensor | None, down: Tensor | None, activation: str, shift: float,
    norm: tuple | None, gate: str = "", rotation: int = 0, rotation_kind: str = "regular",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Quantize x [B T, K] for the products that read it: (codes [B T, K], scales, x D^T [B T, r]), in groups of 64.

    more [B T, K']: further columns of x. norm: (n [B, K], m [B, K] or None, eps, one of NORMS), by which x is
    normalized first; "adaptive" where it has no fourth. gate: of NONLINEARITIES; x is multiplied by that of `more`.
    rotation: the group of inputs that is rotated before smoothing, 0 for none.
    Codes are e4m3 or int8 (4-bit ones too) with float32 scales [B T], or [K / 64, B T] for "int4".
    """
    inputs, branch = before_smoothing(x, more, down, norm, gate, rotation, rotation_kind)
    inputs = _smoothed(inputs, smooth, shift)
    if activation == "int4":
        rounded, scales = quantize_activation_groups(inputs, GROUP, bool(shift))
        return rounded, scales.T.contiguous(), branch
    scales = _row_scale(inputs, activation)
    rounded = inputs / scales
    rounded = rounded.to(fp8.DTYPE) if activation == "fp8" else torch.round(rounded).to(torch.int8)
    return rounded, scales[:, 0].contiguous(), branch


def before_smoothing(
    x: Tensor, more: Tensor | None, down: Tensor | None, norm: tuple | None, gate: str, rotation: int,
    rotation_kind: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(inputs [B T, K], x D^T [B T, r]) float32 of `codes`, up to the rotation."""
    if gate:
        exact = (x * nonlinear(more, gate)).float()
    else:
        exact = x.float() if more is None else torch.cat([x.float(), more.float()], 1)
    if norm is not None:
        exact = normed(exact, *norm)
    branch = exact.new_empty(len(exact), 0) if down is None else F.linear(exact, down.float())
    return turned(exact, rotation, rotation_kind), branch


def turned(x: Tensor, rotation: int, kind: str) -> Tensor:
    """x [..., K] rotated in groups of so many; as it is for 0."""
    return rotate(x, rotation, kind) if rotation else x


def normed(x: Tensor, scale: Tensor, offset: Tensor | None, eps: float, form: str = "adaptive") -> Tensor:
    """x [B T, K] float32 under the norm of this form."""
    size = x.shape[1:]
    x = F.rms_norm(x, size, eps=eps) if form == "rms" else F.layer_norm(x, size, eps=eps)
    gain = scale.float() + 1 if form == "adaptive" else scale.float()
    x = x.unflatten(0, (len(scale), -1)) * gain[:, None]
    return (x if offset is None else x + offset.float()[:, None]).flatten(0, 1)


def product(
    codes: Tensor, scales: Tensor, branch: Tensor, qweight: Tensor, wscales: Tensor, up: Tensor | None,
    bias: Tensor | None, activation: str, nonlinearity: str,
) -> Tensor:  # fmt: skip
    """The layer's float32 outputs [M, N] from what `codes` gives."""
    weight = dequantize_groups(unpack_int4(qweight, GROUP), wscales)
    inputs = dequantize_groups(codes, scales.T) if activation == "int4" else codes.float() * scales[:, None]
    y = F.linear(inputs, weight)
    if up is not None:
        y = y + F.linear(branch.float(), up.float())
    if bias is not None:
        y = y + bias.float()
    return nonlinear(y, nonlinearity)


def nonlinear(y: Tensor, name: str) -> Tensor:
    return NONLINEARITIES[name](y)


def round_activation(x: Tensor, activation: str, group_size: int, unsigned: bool) -> Tensor:
    """x [..., K] float32 -> the values that its codes stand for, float32."""
    if activation == "none":
        return x
    if activation == "int4":
        return dequantize_groups(*quantize_activation_groups(x, group_size, unsigned))
    scale = _row_scale(x, activation)
    if activation == "int8":
        return torch.round(x / scale) * scale
    return (x / scale).to(fp8.DTYPE).float() * scale


def _row_scale(x: Tensor, activation: str) -> Tensor:
    return dynamic_scale(x, (-1,)) if activation == "int8" else fp8.scale_of(x, (-1,))


def _smoothed(x: Tensor, smooth: Tensor | None, shift: float) -> Tensor:
    x = x + shift if shift else x
    return x if smooth is None else x / smooth.float()
