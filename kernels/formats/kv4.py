"""The 4-bit format of keys and values: unsigned codes on a grid of its own for each token of each head.

    m = min x,   s = (max x - min x) / 15          over the d channels of one token in one head, both 16-bit numbers
    q = round((x - m) / s) in [0, 15],   x ~ m + s q
    packed      byte j of a head = q[j] + 16 * q[j + h],    h = ceil(d / 2);  of an odd d the last upper half is 0

4 d + 32 bits for 16 d of the 16-bit form: 0.25 + 2 / d of its bytes (QServe, arXiv:2405.04532, KV4: 4 bits per token
and head with a scale and a zero in 16 bits). That the zero is the least value m, and no whole number of steps, is our
choice: then a row of one value comes back as it was, and so does the least value of every row. s and m are rounded to
16 bits before q is found; halves go to the even code. A row of one value has s = 0 and codes 0.

No code stands for NaN or infinity: a row that holds one, and a row of float32 beyond what the 16-bit type reaches,
has codes 0 and comes back as NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .exact import over

LEVELS = 15


class KV4(NamedTuple):
    """codes uint8 [..., ceil(d / 2)], scales and lows [...] of a 16-bit dtype."""

    codes: Tensor
    scales: Tensor
    lows: Tensor


def grid_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of scales and lows for values of this type: the same 16 bits; for wider ones float16, the finer."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def quantize_kv4(x: Tensor, dtype: torch.dtype | None = None, ends: tuple[Tensor, Tensor] | None = None) -> KV4:
    """x [..., d] float -> codes, scales and lows; these two of `dtype`, by default `grid_dtype` of x.

    ends: where grids begin and end, float32 [...]; what lies beyond takes the first or the last code. By default the
        least and the largest value of each row.

    Raises ValueError where d is 0 or `dtype` has no 16 bits.
    """
    dtype = dtype or grid_dtype(x.dtype)
    if not x.shape[-1]:
        raise ValueError("a head of keys or values has at least one channel; got none.")
    if dtype.itemsize != 2:
        raise ValueError(f"scales of 4-bit keys and values are 16-bit floats, not {dtype}.")
    x = x.float()
    lows, highs = (x.amin(-1), x.amax(-1)) if ends is None else ends
    scales = over(highs - lows, LEVELS).to(dtype)
    lows = lows.to(dtype)
    steps = torch.where(scales == 0, 1.0, scales.float()).unsqueeze(-1)
    codes = ((x - lows.float().unsqueeze(-1)) / steps).round_().clamp_(0, LEVELS)
    strange = ~(scales.isfinite() & lows.isfinite())
    codes = codes.masked_fill_((strange | (scales == 0)).unsqueeze(-1), 0).to(torch.uint8)
    return KV4(pack_kv4(codes), scales.masked_fill(strange, torch.nan), lows)


def dequantize_kv4(kv: KV4, width: int) -> Tensor:
    """Codes, scales and lows of heads of `width` channels -> float32 [..., width].

    Raises ValueError for a width that the codes do not have.
    """
    codes = unpack_kv4(kv.codes, width).float()
    return kv.lows.float().unsqueeze(-1) + kv.scales.float().unsqueeze(-1) * codes


def pack_kv4(codes: Tensor) -> Tensor:
    """codes uint8 [..., d] in [0, 15] -> uint8 [..., ceil(d / 2)]."""
    half = (codes.shape[-1] + 1) // 2
    upper = torch.nn.functional.pad(codes[..., half:], (0, codes.shape[-1] % 2))
    return codes[..., :half] | upper << 4


def unpack_kv4(packed: Tensor, width: int) -> Tensor:
    """packed uint8 [..., ceil(width / 2)] -> uint8 codes [..., width]. Raises ValueError for another width."""
    if packed.shape[-1] != (width + 1) // 2:
        raise ValueError(f"a head of {width} channels has {(width + 1) // 2} bytes; got {packed.shape[-1]}.")
    return torch.cat([packed & 15, packed >> 4], -1)[..., :width]
