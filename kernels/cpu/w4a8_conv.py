"""W4A8 convolutions on a CPU, from packed 4-bit weights: windows of 8-bit codes, then the product of w4a8.py.

    P[m, n, g] = sum_{k in g} (q_x[m, k] - z_x) (q[n, k] - z[n, g]),    k = (kh, kw, channel) of the window at pixel m
    y[m, n] = s_x[b] sum_g s[n, g] P[m, n, g]  +  b[n]                  s_x of picture b; the rest as in w4a8.py

Pixels outside have the code z_x and add nothing. A picture is quantized once, into a byte a value; windows of it are
gathered some hundred rows at a time, a MiB or so, and multiplied while they are in a cache. Bounds and bits are those
of w4a8.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.int4 import GROUP, unpack_int4
from ..formats.int8 import dynamic_scale, quantize_activation
from ..runtime.ops import op
from . import library
from .w4a8 import SCALES, at, check, serves


@op
def cpu_w4a8_conv2d(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    wsteps: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """x [B, C, H, W] float -> [B, N, H', W'] channels_last in x's dtype; zero padding.

    The weight's tensors are those of `cpu_w4a8_linear` with K = kh kw C, in this order. input_scale and
    input_zero_point: one-element tensors, or None for symmetric scales by picture. Without the compiled kernel it is
    `reference`: ask `serves`.

    Raises ValueError for sizes that do not belong together.
    """
    shapes = (None if one is None else one.shape for one in (wzeros, wsteps, bias))
    check(qweight.shape, wscales.shape, math.prod(kernel) * x.shape[1], *shapes)
    size = sizes(x.shape, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    compiled = serves(x.device) and x.numel() and len(qweight)
    convolve = _compiled if compiled else reference
    y = convolve(x, qweight, wscales, wzeros, wsteps, bias, input_scale, input_zero_point, activation_bits, size)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@cpu_w4a8_conv2d.register_fake
def _(x, qweight, wscales, wzeros, wsteps, bias, scale, zero, bits, kernel, stride, padding, dilation):
    height, width = sizes(x.shape, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))[4:6]
    y = x.new_empty(x.shape[0], len(qweight), height, width)
    return y.contiguous(memory_format=torch.channels_last)


def sizes(shape: Sequence[int], kernel: tuple, stride: tuple, padding: tuple, dilation: tuple) -> tuple[int, ...]:
    """(B, H, W, C, H', W', kernel, stride, padding, dilation), each of these two numbers: as w4a8.cpp's Windows."""
    batch, channels, height, width = shape
    out = [
        (length + 2 * pad - far * (size - 1) - 1) // step + 1
        for length, size, step, pad, far in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    return (batch, height, width, channels, *out, *kernel, *stride, *padding, *dilation)


def reference(x, qweight, wscales, wzeros, wsteps, bias, input_scale, input_zero_point, bits, size) -> Tensor:
    """x [B, C, H, W] float -> float32 [B, N, H', W'] by the formula, in float64, on any device: the truth."""
    scale = dynamic_scale(x.float(), (1, 2, 3), bits) if input_scale is None else input_scale
    zero = torch.zeros_like(scale) if input_zero_point is None else input_zero_point
    codes = quantize_activation(x, scale, zero, bits).double() - zero
    kernel, stride, padding, dilation = (size[i : i + 2] for i in (6, 8, 10, 12))
    factors = (wscales if wsteps is None else wsteps * wscales[:, None]).double()
    steps = unpack_int4(qweight, GROUP)[:, : math.prod(kernel) * x.shape[1]].unflatten(1, (factors.shape[1], -1))
    steps = steps if wzeros is None else steps - wzeros[:, :, None]
    weight = (steps * factors[:, :, None]).flatten(1).unflatten(1, (*kernel, x.shape[1])).permute(0, 3, 1, 2)
    y = F.conv2d(codes, weight, None, stride, padding, dilation) * scale.double()
    return (y if bias is None else y + bias.double()[:, None, None]).float()


def _compiled(x, qweight, wscales, wzeros, wsteps, bias, input_scale, input_zero_point, bits, size) -> Tensor:
    x = x.float().contiguous(memory_format=torch.channels_last)
    if input_scale is None:
        scale = dynamic_scale(x, (1, 2, 3), bits).flatten()
    else:
        scale = input_scale.float().expand(1).repeat(len(x))
    zero = 0 if input_zero_point is None else int(input_zero_point.item())
    wscales = (wscales if wscales.dtype in SCALES else wscales.float()).contiguous()
    qweight, wzeros, wsteps = (None if one is None else one.contiguous() for one in (qweight, wzeros, wsteps))
    bias = None if bias is None else bias.float().contiguous()
    groups = (wscales if wsteps is None else wsteps).shape[1]
    y = x.new_empty(len(x), size[4], size[5], len(qweight))
    pixels = x.permute(0, 2, 3, 1).contiguous()  # as it lies, but for strides of single channels or pixels
    if library.found().kernels.ptq4dm_w4a8_conv(
        at(pixels), at(qweight), at(wscales), SCALES[wscales.dtype], at(wzeros), at(wsteps), at(bias), at(y),
        at(_numbers(size)), len(qweight), groups, at(scale), zero, bits,
    ):  # fmt: skip
        raise MemoryError(f"no memory for the 8-bit codes of pictures {list(x.shape)}.")
    return y.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=1024)
def _numbers(size: tuple[int, ...]) -> Tensor:
    return torch.tensor(size, dtype=torch.int64)
