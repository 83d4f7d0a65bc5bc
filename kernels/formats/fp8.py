"""The 8-bit floating format e4m3 (4 bits of exponent, 3 of mantissa, no infinity, largest value 448).

    weight      w ~ s_n * q,  s_n = max|w_n| / 448
    activation  x ~ s * q,    q = e4m3(clamp(x / s, -448, 448))

Rounding is to nearest even; NaN stays NaN, infinity becomes the largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .exact import over
from .int8 import inverse

DTYPE = torch.float8_e4m3fn
LIMIT = 448.0


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x float, scale float32 broadcast against it -> e4m3 codes of x's shape."""
    return (x.float() * inverse(scale)).clamp_(-LIMIT, LIMIT).to(DTYPE)


def scale_of(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """max|x| / 448 over `dims` (kept as size 1), float32; an all-zero slice gets 1."""
    scale = over(x.abs().amax(dim=dims, keepdim=True).float(), LIMIT)
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
