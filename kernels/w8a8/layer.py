"""Linear and Conv2d on 8-bit codes, int8 or e4m3 by the type of the weight's.

    y[m, n] = s_x[m] * s_w[n] * sum_k (q_x[m, k] - z) * q_w[n, k]  +  b[n]  (+ residual[m, n])

A convolution is the same with k running over (channel, ky, kx) and padded positions holding q_x = z. With
`input_scale` the activation is quantized by a fixed (static) scale, in Linear also one for each row, and, for int8, a
zero point; without it, symmetrically by its own maximum: per token in Linear, per sample in Conv2d, where a window
mixes pixels (dynamic).
NaN has no int8 code: a static grid takes it for zero, a dynamic one makes the whole row NaN, as e4m3 does.

Which kernel runs is decided by `kernel_name`, from format, shape and device alone:

    onednn-int8     x86 CPU with VNNI: oneDNN's u8 x s8 kernels through PyTorch
    triton-int8     CUDA from compute capability 8.0 on: implicit GEMM on 8-bit tensor cores (product.py); not for
                    grouped convolutions
    triton-fp8      the same on e4m3, from compute capability 8.9 on
    reference       everywhere: the formula on exactly representable floats (reference.py); the truth
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.ops import op
from ..runtime.settings import capability, remembered, served
from . import onednn, reference
from .steps import triton_conv2d, triton_linear
from .window import Window

REFERENCE, ONEDNN, TRITON, TRITON_FP8 = "reference", "onednn-int8", "triton-int8", "triton-fp8"
_capability, _served = remembered(capability), remembered(served)


def kernel_name(
    device: torch.device, activation_bits: int = 8, groups: int = 1, dtype: torch.dtype = torch.int8
) -> str:
    """The kernel that serves a W8A8 layer. Narrower activations use the same kernels on a narrower grid."""
    if groups == 1 and _served(device):
        if dtype == torch.int8:
            return TRITON
        return TRITON_FP8 if _capability(device) >= (8, 9) else REFERENCE
    onednn = device.type == "cpu" and torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()
    return ONEDNN if onednn and dtype == torch.int8 else REFERENCE


@op
def w8a8_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    residual: Tensor | None = None,
) -> Tensor:
    """x [..., K] float, qweight [N, K], weight_scale [N] float32, bias [N], residual [..., N] -> [..., N], x's dtype.

    input_scale (float32) and input_zero_point (int32) are one-element tensors, or None for dynamic per-token
    quantization and, the zero point, for symmetric grids. input_scale may have one element for each row of x, of a
    grid that is fixed row by row.
    """
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    m, n = rows.shape[0], qweight.shape[0]
    name = kernel_name(x.device, activation_bits, 1, qweight.dtype)
    operands = (rows, qweight, weight_scale, bias, input_scale, input_zero_point, activation_bits)
    if m and name in (TRITON, TRITON_FP8):
        added = None if residual is None else residual.reshape(m, n)
        y = _LINEAR[name](*operands, added)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], n)
    y = (_LINEAR[name] if m else reference.linear)(*operands).reshape(*x.shape[:-1], n)
    return (y if residual is None else y + residual).to(x.dtype)


@w8a8_linear.register_fake
def _(x, qweight, weight_scale, bias, input_scale, input_zero_point, activation_bits, residual=None):
    return x.new_empty(*x.shape[:-1], len(qweight))


@op
def w8a8_conv2d(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x [B, C, H, W] float, qweight [N, C/groups, kh, kw] -> [B, N, H', W'] channels_last in x's dtype.

    Zero padding; the rest as in `w8a8_linear`, with dynamic scales per sample.
    """
    name = kernel_name(x.device, activation_bits, groups, qweight.dtype)
    kernel = _CONV2D[name] if x.numel() else reference.conv2d
    geometry = (list(stride), list(padding), list(dilation), groups)
    y = kernel(x, qweight, weight_scale, bias, input_scale, input_zero_point, activation_bits, *geometry)
    return y if kernel is triton_conv2d else y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@w8a8_conv2d.register_fake
def _(x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups):
    return empty_images(x, len(qweight), qweight.shape[2:], stride, padding, dilation)


def empty_images(
    x: Tensor,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """An empty [B, outputs, H', W'] channels_last in the dtype of x [B, C, H, W]: what such a convolution gives."""
    window = Window(len(x), *x.shape[2:], tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    return x.new_empty(len(x), *window.output, outputs).permute(0, 3, 1, 2)


_LINEAR = {
    REFERENCE: reference.linear,
    ONEDNN: onednn.linear,
    TRITON: triton_linear,
    TRITON_FP8: triton_linear,
}
_CONV2D = {
    REFERENCE: reference.conv2d,
    ONEDNN: onednn.conv2d,
    TRITON: triton_conv2d,
    TRITON_FP8: triton_conv2d,
}
