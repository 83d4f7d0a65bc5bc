"""Linear layers of weights in blocks (formats/blocks.py) under inputs as they come, as an op of torch.

    y[m, n] = sum_k x[m, k] w[n, k] + b[n],    w of its codes by the formula, rounded once to the type of x

    unpack + cublas   CUDA from Ampere on: the weight as floats of the inputs' type, for one call; then the product
    reference         everywhere: the formula in float32; the truth

Bytes of the first part: codes and scales read, 2 N K written in 16 bits; nothing is kept beside the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import blocks
from ..lut.layer import CUBLAS
from ..runtime.late import late
from ..runtime.ops import op
from ..runtime.settings import served
from ..w8a8.layer import REFERENCE

if TYPE_CHECKING:
    from . import floats_triton
else:
    late(globals(), "floats_triton")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def kernel_name(device: torch.device) -> str:
    """The kernel that serves a layer there."""
    return CUBLAS if served(device) else REFERENCE


@op
def blocks_linear(
    x: Tensor, qweight: Tensor, scales: Tensor, offsets: Tensor | None, zero: int, bias: Tensor | None
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight [N, K] int8 or e4m3, or [N, K / 2] uint8 as `blocks.pack` has it; scales [N, G] and offsets [N, G] or None
    float32; bias [N] or None. Raises ValueError for sizes that do not belong together.
    """
    n, k = len(qweight), x.shape[-1]
    width = k // 2 if qweight.dtype == torch.uint8 else k
    if qweight.shape != (n, width) or scales.shape[0] != n or k % max(scales.shape[1], 1):
        raise ValueError(f"codes {list(qweight.shape)} and scales {list(scales.shape)} are not of {k} inputs.")
    if kernel_name(x.device) == REFERENCE or not x.numel():
        y = F.linear(x.float(), weight_of(qweight, scales, offsets, zero), None if bias is None else bias.float())
        return y.to(x.dtype)
    kind = x.dtype if x.dtype in FLOATS else torch.float32
    if qweight.dtype.is_floating_point:
        weight = weight_of(qweight, scales, offsets, zero).to(kind)
    else:
        weight = floats_triton.floats(qweight, scales, offsets, zero, k, kind)
    return F.linear(x.to(kind), weight, None if bias is None else bias.to(kind)).to(x.dtype)


@blocks_linear.register_fake
def _(x, qweight, scales, offsets, zero, bias):
    return x.new_empty(*x.shape[:-1], len(qweight))


def weight_of(qweight: Tensor, scales: Tensor, offsets: Tensor | None, zero: int) -> Tensor:
    """The float32 weight [N, K] that the codes stand for."""
    codes = blocks.unpack(qweight) if qweight.dtype == torch.uint8 else qweight
    return blocks.values(codes, scales, offsets, zero)
