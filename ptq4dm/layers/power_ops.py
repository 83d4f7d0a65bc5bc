"""Products with weights of the power grid, as ops of torch: everywhere the formula in float32.

    y[m, n] = sum_k  s_x (q_x[m, k] - z_x)  s_n^(1/a) sign(q_n) |q_n|^(1/a)  +  b[n]

Levels of the grid are no multiples of one step, so that no product of integers gives their sum; the weight is looked
up in a codebook in each call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.formats.power import grid_of
from ..kernels.runtime.ops import op
from ..kernels.w8a8.layer import empty_images
from .int4_ops import packed_rows, rounded, unpacked_rows


def stored_codes(codes: Tensor, bits: int) -> Tensor:
    """codes int8 [N, K] as they are stored: uint8 [N, K'/2] in 4 bits and less, K' = K up to a multiple of 64."""
    return packed_rows(codes) if bits <= 4 else codes


def codes_of(qweight: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `stored_codes`, int8 [N, inputs]."""
    return unpacked_rows(qweight, inputs) if bits <= 4 else qweight


def weight_of(qweight: Tensor, wscales: Tensor, exponent: float, bits: int, inputs: int) -> Tensor:
    """The float32 weight [N, K] that the codes stand for."""
    return grid_of(wscales, exponent, bits).values(codes_of(qweight, bits, inputs))


@op
def power_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    exponent: float,
    weight_bits: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight as `stored_codes` gives it; wscales [N, 1] float32; bias [N]; the input's grid as in `w8a8_linear`.
    """
    inputs = x.shape[-1]
    rows = rounded(x.reshape(-1, inputs), input_scale, input_zero_point, activation_bits, (1,))
    weight = weight_of(qweight, wscales, exponent, weight_bits, inputs)
    y = F.linear(rows, weight, None if bias is None else bias.float())
    return y.to(x.dtype).view(*x.shape[:-1], len(qweight))


@power_linear.register_fake
def _(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(qweight))


@op
def power_conv2d(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    exponent: float,
    weight_bits: int,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x [B, C, H, W] float -> [B, N, H', W'] channels_last in x's dtype.

    K = C / groups kh kw, in this order; zero padding; the rest as in `power_linear`, with dynamic scales per sample.
    """
    shape = (x.shape[1] // groups, *kernel)
    weight = weight_of(qweight, wscales, exponent, weight_bits, math.prod(shape)).view(-1, *shape)
    pixels = rounded(x, input_scale, input_zero_point, activation_bits, (1, 2, 3))
    geometry = (list(stride), list(padding), list(dilation), groups)
    y = F.conv2d(pixels, weight, None if bias is None else bias.float(), *geometry)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@power_conv2d.register_fake
def _(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    *_, kernel, stride, padding, dilation, _ = rest
    return empty_images(x, len(qweight), kernel, stride, padding, dilation)
