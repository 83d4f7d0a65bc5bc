"""Norms with all that follows them up to the codes of the next product, compiled for this CPU (codes.cpp).

    group    v = (x + t[b, c] - mean_g) / sqrt(var_g + eps) gamma[c] + beta[c],   SiLU(v) or v
    layer    s = x + gate[b, c] y,   v = (s - mean) / sqrt(var + eps) gain[b, c] + shift[b, c]
    codes    clamp(round(v (1 / scale)) + z, -2^(b-1), 2^(b-1) - 1) + 128, uint8: as oneDNN's products take them

In float32 between what is read and what is stored. Ties between two codes can fall on either side, for sums are of
another order than in torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.int8 import quantize_activation
from ..runtime.ops import op
from . import library
from .w4a8 import at

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


@op
def cpu_group_norm(
    x: Tensor,
    added: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
    scale: float,
    zero_point: int,
    bits: int,
) -> Tensor:
    """x [B, C, H, W] float32 or bfloat16 -> GroupNorm(x + added), with SiLU after it where `silu`, channels_last.

    added [B, C] float32, or None. dtype: float32 or bfloat16; uint8: codes + 128 on the grid of scale, zero_point and
    bits, which count for nothing else. Without the compiled kernel it is `group_reference`: ask `library.available`.
    """
    if not (library.available() and x.numel()):
        return group_reference(x, added, gamma, beta, groups, eps, silu, dtype, scale, zero_point, bits)
    batch, channels, height, width = x.shape
    x = _readable(x).contiguous(memory_format=torch.channels_last)
    added, gamma, beta = (None if one is None else one.float().contiguous() for one in (added, gamma, beta))
    y = torch.empty((batch, height, width, channels), dtype=dtype)
    failed = library.found().kernels.ptq4dm_group_norm(
        at(x), KINDS[x.dtype], at(added), at(gamma), at(beta), at(y), batch, height * width, channels, groups, eps,
        int(silu), KINDS[dtype], *_grid(scale, zero_point, bits),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the sums of a norm's groups.")
    return y.permute(0, 3, 1, 2)


@cpu_group_norm.register_fake
def _(x, added, gamma, beta, groups, eps, silu, dtype, scale, zero_point, bits):
    batch, channels, height, width = x.shape
    return x.new_empty(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


@op
def cpu_layer_norm(
    x: Tensor,
    added: Tensor | None,
    gate: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    scale: float,
    zero_point: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """x [B, T, C] float32 -> (s = x + gate added, LayerNorm(s) gain + shift in `dtype`, both [B, T, C]).

    added [B, T, C] float32 or bfloat16, or None: then s is empty. gate [B, C] float32, or None for 1. gain and shift
    [B, C] float32. dtype, scale, zero_point and bits as in `cpu_group_norm`. Without the compiled kernel it is
    `layer_reference`: ask `library.available`.
    """
    if not (library.available() and x.numel()):
        return layer_reference(x, added, gate, gain, shift, eps, dtype, scale, zero_point, bits)
    x, gain, shift = x.contiguous(), gain.contiguous(), shift.contiguous()
    added = None if added is None else _readable(added).contiguous()
    gate = None if gate is None else gate.contiguous()
    (batch, tokens, channels), y = x.shape, torch.empty(x.shape, dtype=dtype)
    sums = x.new_empty(0) if added is None else torch.empty_like(x)
    failed = library.found().kernels.ptq4dm_layer_norm(
        at(x), at(added), KINDS[torch.float32 if added is None else added.dtype], at(gate), at(gain), at(shift),
        at(sums), at(y), batch * tokens, tokens, channels, eps, KINDS[dtype], *_grid(scale, zero_point, bits),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a row of a norm.")
    return sums, y


@cpu_layer_norm.register_fake
def _(x, added, gate, gain, shift, eps, dtype, scale, zero_point, bits):
    return x.new_empty(0) if added is None else torch.empty_like(x), torch.empty_like(x, dtype=dtype)


@op
def cpu_gated_sum(x: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """x + gate added: x [B, T, C] float32, added [B, T, C] float32 or bfloat16, gate [B, C] float32."""
    if not (library.available() and x.numel()):
        return x + gate[:, None] * added.float()
    x, added, gate = x.contiguous(), _readable(added).contiguous(), gate.contiguous()
    (batch, tokens, channels), y = x.shape, torch.empty_like(x)
    failed = library.found().kernels.ptq4dm_layer_norm(
        at(x), at(added), KINDS[added.dtype], at(gate), None, None, at(y), None,
        batch * tokens, tokens, channels, 0.0, 0, 0.0, 0.0, 0.0, 0.0,
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a row of a sum.")
    return y


@cpu_gated_sum.register_fake
def _(x, added, gate):
    return torch.empty_like(x)


@op
def cpu_codes(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """x float32 or bfloat16 -> codes + 128 as uint8, in the order of memory that x has."""
    if not (library.available() and x.numel()):
        return _stored(x, torch.uint8, scale, zero_point, bits)
    x = _readable(x)
    y = torch.empty_like(x, dtype=torch.uint8)
    if y.stride() != x.stride():
        x = x.contiguous()
        y = torch.empty_like(x, dtype=torch.uint8)
    library.found().kernels.ptq4dm_codes(at(x), KINDS[x.dtype], at(y), x.numel(), *_grid(scale, zero_point, bits))
    return y


@cpu_codes.register_fake
def _(x, scale, zero_point, bits):
    return torch.empty_like(x, dtype=torch.uint8)


def group_reference(x, added, gamma, beta, groups, eps, silu, dtype, scale, zero_point, bits) -> Tensor:
    """What `cpu_group_norm` computes, in operations of torch: the truth."""
    x = x.float() if added is None else x.float() + added[:, :, None, None]
    y = F.group_norm(x, groups, gamma.float(), beta.float(), eps)
    y = _stored(F.silu(y) if silu else y, dtype, scale, zero_point, bits)
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def layer_reference(x, added, gate, gain, shift, eps, dtype, scale, zero_point, bits) -> tuple[Tensor, Tensor]:
    """What `cpu_layer_norm` computes, in operations of torch: the truth."""
    sums = x.new_empty(0)
    if added is not None:
        x = sums = x + (added.float() if gate is None else gate[:, None] * added.float())
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * gain[:, None] + shift[:, None]
    return sums, _stored(y, dtype, scale, zero_point, bits)


def _stored(y: Tensor, dtype: torch.dtype, scale: float, zero_point: int, bits: int) -> Tensor:
    if dtype != torch.uint8:
        return y.to(dtype)
    codes = quantize_activation(y, torch.tensor(scale), torch.tensor(zero_point), bits)
    return (codes.short() + 128).to(torch.uint8)


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype in KINDS else x.float()


def _grid(scale: float, zero_point: int, bits: int) -> tuple[float, float, float, float]:
    """(1 / scale, zero point, lowest and highest code) of codes + 128."""
    half = 2 ** (bits - 1)
    return 1.0 / torch.tensor(scale).item(), zero_point + 128.0, 128.0 - half, 127.0 + half
