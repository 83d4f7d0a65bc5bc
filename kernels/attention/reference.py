"""The formula of `kv4_attention` in torch, in tiles of tokens: the truth, and what a CPU runs.

    S[m, n] = scale * sum_j q[m, j] k[n, j] + mask[m, n],    P = softmax over n of S,    y[m] = sum_n P[m, n] v[n]

k = m + s c from 4-bit codes c (formats/kv4.py), v alike. Tile by tile, with the largest S so far as the exponents'
zero, which is corrected where a later tile has a larger one. Keys and values of TILE tokens are unpacked at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.kv4 import KV4, dequantize_kv4

TILE = 64
"""Tokens that are unpacked at a time."""


def attention(q: Tensor, key: KV4, value: KV4, mask: Tensor | None, scale: float) -> Tensor:
    """As the op of layer.py, whose checks were made. Computes in float32, or float64 where q is."""
    wide = torch.promote_types(q.dtype, torch.float32)
    query, width = q.to(wide), q.shape[-1]
    peak = torch.full_like(query[..., :1], -torch.inf)
    total, y = torch.zeros_like(peak), torch.zeros_like(query)
    tokens = key.codes.shape[-2]
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], tokens)
    for start in range(0, tokens, TILE):
        tile = slice(start, start + TILE)
        logits = query @ _tile(key, tile, width).to(wide).mT * scale
        if mask is not None:
            logits += mask[..., tile]
        above = torch.maximum(peak, logits.amax(-1, keepdim=True))
        zero = above.masked_fill(above == -torch.inf, 0)  # where nothing is kept so far
        weights, correction = (logits - zero).exp_(), (peak - zero).exp_()
        total = total * correction + weights.sum(-1, keepdim=True)
        y = y * correction + weights @ _tile(value, tile, width).to(wide)
        peak = above
    return (y / total.masked_fill(total == 0, 1)).to(q.dtype)


def _tile(kv: KV4, tile: slice, width: int) -> Tensor:
    return dequantize_kv4(KV4(kv.codes[..., tile, :], kv.scales[..., tile], kv.lows[..., tile]), width)
