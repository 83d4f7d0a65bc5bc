"""The op behind cross-attention with 4-bit keys and values, and which kernel serves it.

triton-kv4      CUDA from compute capability 8.0 on, queries of 16 or 32 bits: tiles of codes (product.py)
reference       everywhere: the formula in torch, in tiles of tokens (reference.py); the truth
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.kv4 import KV4
from ..runtime.late import late
from ..runtime.ops import op
from ..runtime.settings import remembered, served
from . import reference

if TYPE_CHECKING:
    from . import product
else:
    late(globals(), "product")

REFERENCE, TRITON = "reference", "triton-kv4"
_served = remembered(served)


def kernel_name(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The kernel that serves queries of this dtype on this device."""
    return TRITON if dtype != torch.float64 and _served(device) else REFERENCE


@op
def kv4_attention(
    q: Tensor,
    kcodes: Tensor,
    kscales: Tensor,
    klows: Tensor,
    vcodes: Tensor,
    vscales: Tensor,
    vlows: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """q [B, H, M, d] float over L tokens in 4 bits -> [B, H, M, d] in q's dtype, laid out as [B, M, H, d].

    kcodes, vcodes: uint8 [B, H, L, ceil(d / 2)]. kscales, klows, vscales, vlows: 16-bit [B, H, L]; formats/kv4.py.
    mask: bool (True: kept) or float, which is added; broadcast to [B, H, M, L]. A query that may look at no token
    gets zeros, as in torch's scaled_dot_product_attention. scale: of the products.

    Raises ValueError for shapes that do not fit together.
    """
    key, value = KV4(kcodes, kscales, klows), KV4(vcodes, vscales, vlows)
    _check(q, key, value, mask)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    if kernel_name(q.device, q.dtype) == TRITON:
        return product.attention(q, key, value, mask, scale)
    return _laid_out(q).copy_(reference.attention(q, key, value, mask, scale))


@kv4_attention.register_fake
def _(q, kcodes, kscales, klows, vcodes, vscales, vlows, mask, scale):
    return _laid_out(q)


def _laid_out(q: Tensor) -> Tensor:
    """Room for the result: what follows joins the heads of a token, and needs no copy so."""
    batch, heads, rows, width = q.shape
    return q.new_empty(batch, rows, heads, width).transpose(1, 2)


def _check(q: Tensor, key: KV4, value: KV4, mask: Tensor | None) -> None:
    batch, heads, rows, width = q.shape
    tokens = key.codes.shape[-2]
    for what, kv in (("keys", key), ("values", value)):
        shapes = tuple(kv.codes.shape), tuple(kv.scales.shape), tuple(kv.lows.shape)
        due = (batch, heads, tokens, (width + 1) // 2), (batch, heads, tokens), (batch, heads, tokens)
        if not tokens or shapes != due:
            raise ValueError(f"{what} for queries {list(q.shape)} are {due} of 1 token or more; got {shapes}.")
        if kv.codes.dtype != torch.uint8:
            raise ValueError(f"codes of {what} are uint8, two in a byte, not {kv.codes.dtype}.")
    full = (batch, heads, rows, tokens)
    if mask is not None and (
        mask.ndim != 4 or any(size not in (1, due) for size, due in zip(mask.shape, full, strict=True))
    ):
        raise ValueError(f"a mask is broadcast to {list(full)}, which {list(mask.shape)} cannot be.")
