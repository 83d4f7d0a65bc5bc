"""The 8-bit format of attention's operands: queries and keys to be multiplied in int8 or e4m3, values in e4m3.

    queries  a scale for each token of each head,               top a = max_j |q_j|
    keys     a mean is taken out: it adds the same number to all logits of a query, which softmax does not see; then
             a scale for each BLOCK tokens of each head,        top b = max_n max_j |k_nj - mean_j|
    values   a mean is taken out as well, and comes back at the end, for the weights of a query sum to 1; then a
             scale for each BLOCK tokens of each head,          448 c = max_n max_j |v_nj - mean_j|

top is 127 for int8 and 448 for e4m3. int8 has the smaller error where the largest value is not far above the others,
e4m3 where it is. SageAttention (arXiv:2410.02367) takes the keys' mean out and has int8 by blocks, its second version
(arXiv:2411.10958) adds P and values in e4m3, and the values' mean as a choice. Ours are the scales of queries by
token and of values by block: they cost products nothing, for softmax multiplies each query by a number anyway, and c
goes into the exponent of P, as its logarithm. Any vector would do for a mean: it is that of SAMPLES tokens, so that
keys and values are read once, not twice.

Tokens are filled up with codes 0 to whole blocks, a head to W channels. Values lie transposed, [B, H, W, tokens], as
tensor cores read them, and within each 16 tokens in the order ORDER: so a thread that holds sums of queries and keys
holds what it needs of P (kernels/attention/product8_hopper.py).

What no code stands for makes NaN of what it meets: of a query, of a head (a key), of a channel of a head (a value).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
"""Tokens that share a scale of keys, and that kernels take at a time."""
E4M3_TOP = 448.0
LOG2E = math.log2(math.e)
TYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
"""Of queries and keys, by name."""
SAMPLES = 512
"""Tokens, spread over all, whose mean is taken out; all where there are no more."""
FLOOR = 2.0**-60
"""The least scale of values: of a block that is its mean, whose logarithm must not be infinite."""
ORDER = [8 * (place >> 1 & 1) + 2 * (place >> 2) + (place & 1) for place in range(16)]
"""The token at each place of 16 in the values' codes."""


class Codes8(NamedTuple):
    """q [B, H, M', W], k [B, H, L', W] int8 or e4m3, v [B, H, W, L'] e4m3; M', L' whole blocks, W a power of 2.

    float32: q_scales [B, H, M'] (times the scale of the logits and log2(e)), k_scales and v_logs
    [B, H, L' / BLOCK], v_means [B, H, W]. v_logs: log2 of the values' scales, as exponents take them.
    """

    q: Tensor
    q_scales: Tensor
    k: Tensor
    k_scales: Tensor
    v: Tensor
    v_logs: Tensor
    v_means: Tensor


def top(dtype: torch.dtype) -> float:
    """The largest code."""
    return 127.0 if dtype == torch.int8 else E4M3_TOP


def padded(width: int) -> int:
    """Channels of a head in the codes: a power of 2 from 32 on, the least that a product of 8 bits takes."""
    return max(32, 1 << (width - 1).bit_length())


def sizes(rows: int, tokens: int, width: int) -> tuple[int, int, int]:
    """(blocks of queries, blocks of keys, W)."""
    return -(-rows // BLOCK), -(-tokens // BLOCK), padded(width)


def sampled(tokens: int, device: torch.device | None = None) -> Tensor:
    """int64 [min(tokens, SAMPLES)]: one of each SAMPLES-th part of the tokens, at places without a period."""
    count = min(tokens, SAMPLES)
    i = torch.arange(count, device=device)
    return (i * tokens + (i * 40503 % 1024) * tokens // 1024) // count


def quantize8(q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype, centered: bool = True) -> Codes8:
    """q [B, H, M, d], k and v [B, H, L, d] float -> codes; queries and keys in `dtype`, int8 or torch.float8_e4m3fn.

    scale: of the logits. centered: False leaves the keys' mean in, for comparisons.
    """
    q_blocks, k_blocks, channels = sizes(q.shape[2], k.shape[2], q.shape[3])
    wide = (0, channels - q.shape[3])
    q, k, v = (x.float() for x in (q, k, v))
    q_scales = q.abs().amax(-1) / top(dtype) + (q * 0).sum(-1)
    q_codes = _codes(q / _divisor(q_scales).unsqueeze(-1), dtype)
    some = sampled(k.shape[2], k.device)
    k_mean, v_mean = (x[..., some, :].mean(-2, keepdim=True) for x in (k, v))
    k, v = (_in_blocks(x, k_blocks) for x in (k - k_mean if centered else k, v - v_mean))
    k_scales = k.abs().amax((-1, -2)) / top(dtype) + (k * 0).sum((-1, -2))
    k_codes = _codes(k / _divisor(k_scales)[..., None, None], dtype).flatten(2, 3)
    v_scales = (v.abs().nan_to_num(0, 0).amax((-1, -2)) / E4M3_TOP).clamp(min=FLOOR)
    v = torch.where(v.isfinite(), v / v_scales[..., None, None], torch.nan).flatten(2, 3)
    v = _codes(v.unflatten(2, (-1, 16))[..., ORDER, :].flatten(2, 3), TYPES["e4m3"])
    codes = Codes8(
        pad(q_codes, (*wide, 0, q_blocks * BLOCK - q.shape[2])),
        pad(q_scales * (scale * LOG2E), (0, q_blocks * BLOCK - q.shape[2])),
        pad(k_codes, wide), k_scales, pad(v, wide).mT, v_scales.log2(), pad(v_mean.squeeze(-2), wide),
    )  # fmt: skip
    return Codes8(*(part.contiguous() for part in codes))


def _in_blocks(x: Tensor, blocks: int) -> Tensor:
    """[B, H, L, d] -> [B, H, blocks, BLOCK, d], filled up with zeros."""
    return pad(x, (0, 0, 0, blocks * BLOCK - x.shape[2])).unflatten(2, (blocks, BLOCK))


def empty_codes(like: Tensor, rows: int, tokens: int, dtype: torch.dtype) -> Codes8:
    """Room for the codes of so many queries, with heads like these, and of so many keys."""
    batch, heads, _, width = like.shape
    q_blocks, k_blocks, channels = sizes(rows, tokens, width)
    forms = [
        ((q_blocks * BLOCK, channels), dtype), ((q_blocks * BLOCK,), torch.float32),
        ((k_blocks * BLOCK, channels), dtype), ((k_blocks,), torch.float32),
        ((channels, k_blocks * BLOCK), TYPES["e4m3"]), ((k_blocks,), torch.float32), ((channels,), torch.float32),
    ]  # fmt: skip
    return Codes8(*(like.new_empty(batch, heads, *shape, dtype=kind) for shape, kind in forms))


def _divisor(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def _codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.clamp(-top(dtype), top(dtype))
    return (x.nan_to_num().round() if dtype == torch.int8 else x).to(dtype)
