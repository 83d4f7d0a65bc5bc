"""Products of 8-bit inputs with progressive 4-bit weights, as ops of torch.

    y[m, n] = s_x[m] s0[n] sum_k (q_x[m, k] - z_x) w8[n, k]  +  b[n],    w8[n, k] = s1[n, g] (q[n, k] - z[n, g])

w8 is an int8 operand without any rounding (kernels/formats/progressive.py), so that every kernel of W8A8 layers takes
it, and all of them give what the formula says:

    triton-w4a8-progressive     CUDA, Linear, dynamic inputs: w8 in the product itself
    unpack + triton-int8        CUDA, everything else: w8 in memory for one call, then the W8A8 kernel
    cpu-w4a8                    x86 CPU: 4-bit codes in a kernel that is compiled here (kernels/cpu/)
    onednn-int8 on an int8 copy x86 CPU, convolutions with large windows, and where that one does not serve: the W8A8
                                kernel on a copy that is kept
    reference                   everywhere else: the W8A8 formula

Which one: kernels/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu import w4a8 as cpu
from ..kernels.cpu.w4a8_conv import cpu_w4a8_conv2d
from ..kernels.formats.hadamard import turned
from ..kernels.runtime.ops import op
from ..kernels.runtime.prepared import prepared
from ..kernels.w4 import integer
from ..kernels.w4.progressive import progressive_codes, progressive_linear
from ..kernels.w8a8 import layer as w8a8
from . import int4_ops
from .int4_ops import windows


def kernel_name(
    device: torch.device, linear: bool, inputs: int, steps: int, static: bool, bits: int, groups: int
) -> str:
    """The kernel that serves a layer of K = `inputs` with `steps` per output; groups: those of a convolution."""
    return int4_ops.kernel_name(device, linear, inputs, steps, True, static, bits, groups, True)


@torch.compiler.assume_constant_result  # a GPU stays what it is, and the compiler does not know how to ask
def serves_tokens(device: torch.device, inputs: int, steps: int) -> bool:
    """Whether a kernel of that device multiplies tokens in 8 bits that were made before it."""
    return device.type == "cuda" and kernel_name(device, True, inputs, steps, False, 8, 1) == integer.PROGRESSIVE


@op
def stepped_linear(
    x: Tensor,
    qweight: Tensor,
    wsteps: Tensor,
    wzeros: Tensor,
    wscales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    rotation: int,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight uint8 [N, K'/2] as in `int4_linear`, wsteps and wzeros int8 [N, G], wscales [N] float; bias [N]; the
    input's grid as in `w8a8_linear`; rotation: of x by `hadamard.turned`, before it is rounded.
    """
    x, inputs = turned(x, rotation), x.shape[-1]
    name = kernel_name(x.device, True, inputs, wsteps.shape[1], input_scale is not None, activation_bits, 1)
    if name == integer.PROGRESSIVE:
        return progressive_linear(x, qweight, wsteps, wzeros, _wide(wscales), bias)
    grid = (input_scale, input_zero_point, activation_bits)
    if name == cpu.NAME:
        return cpu.cpu_w4a8_linear(x, qweight, wscales, wzeros, wsteps, bias, *grid)
    codes = _int8(qweight, wsteps, wzeros, inputs)
    return w8a8.w8a8_linear(x, codes, _wide(wscales), bias, *grid)


@stepped_linear.register_fake
def _(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(qweight))


@op
def stepped_conv2d(
    x: Tensor,
    qweight: Tensor,
    wsteps: Tensor,
    wzeros: Tensor,
    wscales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    rotation: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x [B, C, H, W] float -> [B, N, H', W'] channels_last in x's dtype.

    K = kh kw C / groups, in this order of pixels and channels; zero padding; the rest as in `stepped_linear`, with
    dynamic scales per sample.
    """
    channels = x.shape[1] // groups
    x = turned(x.movedim(1, -1), rotation).movedim(-1, 1) if rotation else x
    inputs, static = channels * kernel[0] * kernel[1], input_scale is not None
    grid = (input_scale, input_zero_point, activation_bits)
    geometry = (list(stride), list(padding), list(dilation), groups)
    if kernel_name(x.device, False, inputs, wsteps.shape[1], static, activation_bits, groups) == cpu.NAME:
        weight = (qweight, wscales, wzeros, wsteps)
        return cpu_w4a8_conv2d(x, *weight, bias, *grid, list(kernel), *geometry[:3])
    codes = _int8(qweight, wsteps, wzeros, inputs, kernel)
    return w8a8.w8a8_conv2d(x, codes, _wide(wscales), bias, *grid, *geometry)


@stepped_conv2d.register_fake
def _(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    *_, kernel, stride, padding, dilation, _ = rest
    return w8a8.empty_images(x, len(qweight), kernel, stride, padding, dilation)


def _int8(qweight: Tensor, wsteps: Tensor, wzeros: Tensor, inputs: int, kernel: Sequence[int] = ()) -> Tensor:
    """w8, [N, K] or `windows` of it: made for this call on a GPU, once on a CPU."""
    make = lambda: windows(progressive_codes(qweight, wsteps, wzeros, inputs), kernel)  # noqa: E731
    return make() if qweight.is_cuda else prepared(qweight, ("progressive", inputs, *kernel), make, wsteps, wzeros)


def _wide(wscales: Tensor) -> Tensor:
    """Scales of the rows in float32, made once."""
    return prepared(wscales, torch.float32, wscales.float)
