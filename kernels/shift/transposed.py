"""The gradient of a convolution by its input, as a convolution of the gradient by its output.

    dx[y, c] = sum_{n, tap} d[(y + p - tap dil) / s, n] w[n, tap, c],    where the quotient is whole

Between the pixels of d, s - 1 zeros are put; the weight is turned round and its two kinds of channels change places;
the padding is dil (k - 1) - p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..w8a8.window import turned_padding
from .products import shift_conv2d


def takes(kernel, padding, dilation) -> bool:
    """Whether the padding that this needs is not below zero."""
    return all(p <= d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True))


def shift_input_gradient(
    gradient: Tensor,
    weight: Tensor,
    gradient_steps: Tensor,
    weight_steps: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """gradient [B, H', W', N] int8, weight [N, kh, kw, C] int8, gradient_steps [B], weight_steps [C] float32
    -> [B, H, W, C] of dtype; size: H and W."""
    kernel = weight.shape[1:3]
    around = turned_padding(kernel, padding, dilation)
    turned = weight.flip(1, 2).permute(3, 1, 2, 0).contiguous()
    if stride != (1, 1):
        h, w = (n - 2 * a + d * (k - 1) for n, a, d, k in zip(size, around, dilation, kernel, strict=True))
        gradient = spread(gradient, stride, (h, w))
    return shift_conv2d(gradient, turned, gradient_steps, weight_steps, None, (1, 1), around, dilation, dtype)


def spread(x: Tensor, stride: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """x [B, H, W, C] with zeros between its pixels, and after them up to so many lines and pixels."""
    wide = x.new_zeros(len(x), *size, x.shape[3])
    wide[:, :: stride[0], :: stride[1]][:, : x.shape[1], : x.shape[2]] = x
    return wide
