"""The op of attention on 8-bit operands, and which kernels serve it.

gluon-attention8    Hopper, heads of 33 to 128 channels: loads and halves of queries in their own warps
                    (product8_hopper.py)
triton-attention8   other GPUs that multiply e4m3, from compute capability 8.9 on (product8.py)
reference           everywhere: the formula in torch (formats/attention8.py, reference8.py); the truth

A call makes the codes (codes8.py) and multiplies them; neither the 16-bit logits nor P ever are in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats import attention8 as formats
from ..runtime.late import late
from ..runtime.ops import op
from ..runtime.settings import capability, remembered
from . import reference8

if TYPE_CHECKING:
    from . import codes8, product8, product8_hopper
else:
    late(globals(), "codes8", "product8", "product8_hopper")

REFERENCE, TRITON, GLUON = "reference", "triton-attention8", "gluon-attention8"
WIDEST = 256
"""Channels of a head that kernels take; more do not fit beside their sums in registers."""


def kernel_name(device: torch.device, width: int) -> str:
    """The kernel that serves heads of so many channels on this device."""
    if device.type != "cuda" or width > WIDEST or capability(device) < (8, 9):
        return REFERENCE
    return GLUON if capability(device)[0] == 9 and formats.padded(width) in (64, 128) else TRITON


known_name = remembered(kernel_name)


@op
def attention8(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str) -> Tensor:
    """q [B, H, M, d], k and v [B, H, L, d] float -> [B, H, M, d] in q's dtype, laid out as [B, M, H, d].

    scale: of the logits. kind: "int8" or "e4m3", of the codes of queries and keys; P and values are in e4m3.

    Raises ValueError for shapes that do not fit together, or another kind.
    """
    check(q, k, v, kind)
    if not q.numel():
        return _laid_out(q).transpose(1, 2)
    return through(known_name(q.device, q.shape[-1]), q, k, v, scale, kind)


def through(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str) -> Tensor:
    """What the op does, by the kernel of this name."""
    y, dtype, tokens = _laid_out(q), formats.TYPES[kind], k.shape[2]
    if name == REFERENCE:
        codes = formats.quantize8(q, k, v, scale, dtype)
        y.transpose(1, 2).copy_(reference8.attention(codes, q.shape[2], tokens, q.shape[3], q.dtype))
    else:
        codes = codes8.quantize8(q, k, v, scale, dtype)
        (product8_hopper if name == GLUON else product8).attention(codes, y, tokens)
    return y.transpose(1, 2)


@attention8.register_fake
def _(q, k, v, scale, kind):
    return _laid_out(q).transpose(1, 2)


def _laid_out(q: Tensor) -> Tensor:
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width)


def check(q: Tensor, k: Tensor, v: Tensor, kind: str) -> None:
    if kind not in formats.TYPES:
        known = " or ".join(f"'{name}'" for name in formats.TYPES)
        raise ValueError(f"codes of queries and keys are {known}, not '{kind}'.")
    batch, heads, _, width = q.shape
    due = batch, heads, k.shape[2], width
    if not k.shape[2] or tuple(k.shape) != due or tuple(v.shape) != due:
        raise ValueError(
            f"keys and values for queries {list(q.shape)} are [{batch}, {heads}, 1 or more, {width}]; got "
            f"{list(k.shape)} and {list(v.shape)}."
        )
