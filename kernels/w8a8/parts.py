"""W8A8 on an input in parts, of channels with a factor f and an offset o each (layers/split): its codes in one pass.

    q_x = clamp(round(x f / s) + z + o),    y = s s_w[n] (sum_k q_x q_w - z sum_k q_w) + b[n]

b has what the offsets add taken off. The product is that of `from_codes`, which does not know of parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.late import late
from ..runtime.ops import op
from . import layer, reference
from .from_codes import w8a8_conv2d_codes
from .window import Window

if TYPE_CHECKING:
    from . import quantize
else:
    late(globals(), "quantize")


@torch.compiler.assume_constant_result
def takes_parts(device: torch.device) -> bool:
    """Whether codes of parts are made in a kernel there: elsewhere x is mapped by operations of torch."""
    return layer.kernel_name(device) == layer.TRITON


@op
def w8a8_quantize_parts(
    x: Tensor,
    factors: Tensor,
    offsets: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    padding: Sequence[int],
) -> Tensor:
    """x [B, C, H, W] float, factors and offsets float32 [C] -> int8 codes in the flat layout of `window`."""
    if takes_parts(x.device) and x.numel():
        return quantize.quantize(x, scale, zero_point, bits, torch.int8, tuple(padding), 1, factors, offsets)
    return reference.quantize(x, scale, zero_point, bits, torch.int8, padding, 1, factors, offsets)


@w8a8_quantize_parts.register_fake
def _(x, factors, offsets, scale, zero_point, bits, padding):
    batch, channels, h, w = x.shape
    window = Window(batch, h, w, padding=tuple(padding))
    return x.new_empty(window.rows, -(-channels // 32) * 32, dtype=torch.int8)


def linear(
    x: Tensor, factors: Tensor, offsets: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    input_scale: Tensor, input_zero_point: Tensor, bits: int,
) -> Tensor:  # fmt: skip
    """x [..., K] float -> [..., N] in x's dtype; arguments after x and its map as in `w8a8_linear`."""
    rows = x.reshape(-1, x.shape[-1], 1, 1)
    operands = (qweight, weight_scale, bias, input_scale, input_zero_point, bits)
    y = conv2d(rows, factors, offsets, *operands, [1, 1], [0, 0], [1, 1])
    return y.reshape(*x.shape[:-1], len(qweight))


def conv2d(
    x: Tensor, factors: Tensor, offsets: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    input_scale: Tensor, input_zero_point: Tensor, bits: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """x [B, C, H, W] float -> [B, N, H', W'] channels_last in x's dtype; as in `w8a8_conv2d`, of one group."""
    codes = w8a8_quantize_parts(x, factors, offsets, input_scale, input_zero_point, bits, padding)
    image = [len(x), *x.shape[2:]]
    grid = (input_scale, input_zero_point)
    return w8a8_conv2d_codes(
        codes, image, qweight, weight_scale, bias, *grid, stride, padding, dilation, None, None, x.dtype
    )
