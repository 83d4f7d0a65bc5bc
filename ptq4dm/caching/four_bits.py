"""A text's keys and values in 4 bits (kernels/formats/kv4.py), rounded for what attention makes of them.

    softmax_n(q k_n) = softmax_n(q (k_n - m))       for any m: keys are stored less their mean over the tokens
    y = sum_n P_n v_n                               an error that all values share reaches every query whole

Keys: no query sees what the keys of all tokens have in common, so no grid need reach that far; nothing is stored for
it. Values: the first half of the tokens is rounded, and what its errors add up to is taken off the others in equal
shares; so with half of these, and on to the last. Each value stays about as near as rounding lets it, and errors
cancel in the sum, as a delta-sigma converter has its noise where nobody listens. That helps as far as a query looks
at all tokens alike, and most where tokens are alike, as those that pad a prompt: rounded each by itself they all have
one error. Of both, a token's grid ends where its squared error is least, not at the largest value.

All three are our choice, and go beyond QServe (arXiv:2405.04532), which rounds to the nearest on a grid from the
least to the largest value. They cost no byte, and nothing when attention reads. Figures: kernels/attention/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.formats.kv4 import KV4, dequantize_kv4, grid_dtype, quantize_kv4

SHRUNK = (1.0, 0.93, 0.86, 0.79)
"""How far each end of a grid is tried, from the middle of a token's values to the least or the largest."""
SPARED = 16
"""Errors are shared as if there were a 16th more tokens: else the last few would take all that is left."""


def keys_in_4_bits(keys: Tensor) -> KV4:
    """Codes of keys [..., L, d] float less their mean over L, which changes no softmax over the tokens."""
    x, dtype = keys.float(), grid_dtype(keys.dtype)
    x = x - x.mean(-2, keepdim=True)
    return quantize_kv4(x, dtype, best_ends(x, dtype))


def values_in_4_bits(values: Tensor) -> KV4:
    """Codes of values [..., L, d] float whose errors nearly cancel when they are added over L."""
    x, dtype = values.float(), grid_dtype(values.dtype)
    tokens, width = x.shape[-2:]
    lows, highs = best_ends(x, dtype)
    parts, start = [], 0
    missed = torch.zeros_like(x[..., :1, :])
    while start < tokens:
        some = slice(start, (start + tokens + 1) // 2)
        wanted = x[..., some, :]
        share = missed / (tokens - start + tokens / SPARED)
        parts.append(quantize_kv4(wanted + share, dtype, (lows[..., some], highs[..., some])))
        missed = missed + (wanted - dequantize_kv4(parts[-1], width)).sum(-2, keepdim=True)
        start = some.stop
    codes, scales, least = zip(*parts, strict=True)
    return KV4(torch.cat(codes, -2), torch.cat(scales, -1), torch.cat(least, -1))


def best_ends(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lows, highs) [...] of grids of `dtype` for x [..., d] float32, each end the one of SHRUNK with least error.

    A row that comes back as NaN with its own ends keeps these, and does so.
    """

    def errors(*ends: Tensor) -> Tensor:
        kv = quantize_kv4(x.expand(*ends[0].shape, -1), dtype, ends)
        return (dequantize_kv4(kv, x.shape[-1]) - x).square().sum(-1)

    lows, highs = x.amin(-1), x.amax(-1)
    middle, half = (lows + highs) / 2, (highs - lows) / 2
    shares = torch.tensor(SHRUNK, device=x.device)
    above = middle + half * shares.view(-1, *[1] * half.ndim)
    least = errors(lows, highs)
    for share in SHRUNK:  # of the lower end, with all of the upper one at a time
        below = middle - half * share
        found, which = errors(below.expand_as(above), above).min(0)
        better = found < least
        least = torch.where(better, found, least)
        lows = torch.where(better, below, lows)
        highs = torch.where(better, middle + half * shares[which], highs)
    return lows, highs
