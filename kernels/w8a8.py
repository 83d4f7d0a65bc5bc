"""Linear and Conv2d on int8 codes.

    y[m, n] = s_x[m] * s_w[n] * sum_k (q_x[m, k] - z) * q_w[n, k]  +  b[n]

The sum is exact integer arithmetic; a convolution is the same with k running over (channel, ky, kx) and padded
positions holding q_x = z. With `input_scale` the activation is quantized by a fixed (static) scale and zero point;
without it, symmetrically by its own maximum: per token in Linear, per sample in Conv2d, where a window mixes
pixels (dynamic).

Which kernel runs is decided by `kernel_name`, from format, shape and device alone:

    onednn-int8     x86 CPU with VNNI: oneDNN's u8 x s8 kernels through PyTorch
    triton-int8     CUDA: implicit GEMM on int8 tensor cores (w8a8_triton.py); not for grouped convolutions
    reference       everywhere: the formula on exactly representable floats; the truth
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .int8 import dynamic_scale, quantize_activation, quantize_activation_uint8, weight_limit

REFERENCE, ONEDNN, TRITON = "reference", "onednn-int8", "triton-int8"


def kernel_name(device: torch.device, activation_bits: int = 8, groups: int = 1) -> str:
    """The kernel that serves a W8A8 layer. Narrower activations use the same kernels on a narrower grid."""
    if device.type == "cpu" and torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available():
        return ONEDNN
    if device.type == "cuda" and groups == 1:
        return TRITON
    return REFERENCE


# --- the ops ------------------------------------------------------------------------------------------------


@torch.library.custom_op("ptq4dm::w8a8_linear", mutates_args=())
def w8a8_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """x [..., K] float, qweight [N, K] int8, weight_scale [N] float32, bias [N] -> [..., N] in x's dtype.

    input_scale (float32) and input_zero_point (int32) are one-element tensors, or None for dynamic per-token
    quantization.
    """
    rows = x.reshape(-1, x.shape[-1])
    kernel = _LINEAR[kernel_name(x.device, activation_bits)] if len(rows) else reference_linear
    y = kernel(rows, qweight, weight_scale, bias, input_scale, input_zero_point, activation_bits)
    return y.to(x.dtype).reshape(*x.shape[:-1], len(qweight))


@w8a8_linear.register_fake
def _(x, qweight, weight_scale, bias, input_scale, input_zero_point, activation_bits):
    return x.new_empty(*x.shape[:-1], len(qweight))


@torch.library.custom_op("ptq4dm::w8a8_conv2d", mutates_args=())
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
    """x [B, C, H, W] float, qweight [N, C/groups, kh, kw] int8 -> [B, N, H', W'] channels_last in x's dtype.

    Zero padding; the rest as in `w8a8_linear`, with dynamic scales per sample.
    """
    name = kernel_name(x.device, activation_bits, groups)
    kernel = _CONV2D[name] if x.numel() else reference_conv2d
    geometry = (list(stride), list(padding), list(dilation), groups)
    y = kernel(x, qweight, weight_scale, bias, input_scale, input_zero_point, activation_bits, *geometry)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


@w8a8_conv2d.register_fake
def _(x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups):
    size = _output_size(x, qweight, stride, padding, dilation)
    y = x.new_empty(len(x), len(qweight), *size)
    return y.to(memory_format=torch.channels_last)


# --- reference ----------------------------------------------------------------------------------------------


def reference_linear(x, qweight, weight_scale, bias, input_scale, input_zero_point, bits) -> Tensor:
    """The formula. Products of codes are summed in a float type that holds every partial sum exactly."""
    codes, scale = _centred_codes(x, input_scale, input_zero_point, bits, dims=(1,))
    exact = _exact_dtype(qweight)
    total = codes.to(exact) @ qweight.to(exact).T
    y = total.double() * (scale.double() * weight_scale.double())
    return (y if bias is None else y + bias.double()).float()


def reference_conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    """The formula; padding with zeros after the zero point is taken off is padding with q_x = z."""
    codes, scale = _centred_codes(x, input_scale, input_zero_point, bits, dims=(1, 2, 3))
    exact = _exact_dtype(qweight)
    total = F.conv2d(codes.to(exact), qweight.to(exact), None, stride, padding, dilation, groups)
    y = total.double() * (scale.double() * weight_scale.double()[:, None, None])
    return (y if bias is None else y + bias.double()[:, None, None]).float()


def _centred_codes(x, input_scale, input_zero_point, bits, dims):
    """(q_x - z as float32, s_x), with s_x broadcastable against the output."""
    if input_scale is None:
        scale = dynamic_scale(x, dims, bits)
        return quantize_activation(x, scale, torch.zeros_like(scale), bits).float(), scale
    codes = quantize_activation(x, input_scale, input_zero_point, bits)
    return codes.float() - input_zero_point, input_scale


def _exact_dtype(qweight: Tensor) -> torch.dtype:
    """float32 while no sum of K products of codes can pass 2^24, else float64."""
    terms = qweight[0].numel()
    return torch.float32 if terms * 255 * weight_limit(8) < 2**24 else torch.float64


# --- oneDNN (CPU) -------------------------------------------------------------------------------------------


def _onednn_linear(x, qweight, weight_scale, bias, input_scale, input_zero_point, bits) -> Tensor:
    packed = _prepared(qweight, "linear", lambda: torch.ops.onednn.qlinear_prepack(qweight, None))
    codes, scale, zero_point, after = _uint8_codes(x.float(), input_scale, input_zero_point, bits, (1,))
    zero_points = torch.zeros(len(qweight), dtype=torch.int64)
    early = None if after is not None or bias is None else bias.float()
    y = torch.ops.onednn.qlinear_pointwise(
        codes, scale, zero_point, packed, weight_scale, zero_points, early,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    if after is not None:
        y = y.mul_(after) if bias is None else torch.addcmul(bias.float(), y, after)
    return y


def _onednn_conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    packed = _prepared(
        qweight,
        ("conv2d", tuple(stride), tuple(padding), tuple(dilation), groups),
        lambda: torch.ops.onednn.qconv_prepack(
            qweight, weight_scale, 1.0, 128, stride, padding, dilation, groups, None
        ),
    )
    x = x.float().contiguous(memory_format=torch.channels_last)
    codes, scale, zero_point, after = _uint8_codes(x, input_scale, input_zero_point, bits, (1, 2, 3))
    zero_points = torch.zeros(len(qweight), dtype=torch.int64)
    early = None if after is not None or bias is None else bias.float()
    y = torch.ops.onednn.qconv2d_pointwise(
        codes, scale, zero_point, packed, weight_scale, zero_points, early,
        stride, padding, dilation, groups, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    if after is not None:
        y = y.mul_(after) if bias is None else torch.addcmul(bias.float()[:, None, None], y, after)
    return y


def _uint8_codes(x, input_scale, input_zero_point, bits, dims):
    """(codes + 128 as uint8, scale, zero point + 128, dynamic scales to multiply the output by or None)."""
    if input_scale is None:
        after = dynamic_scale(x, dims, bits)
        codes = quantize_activation_uint8(x * (1.0 / after), 1.0, 0)  # inside +-(2^(b-1)-1) by construction
        return codes, 1.0, 128, after
    scale, zero_point = input_scale.item(), int(input_zero_point.item())
    codes = quantize_activation_uint8(x, scale, zero_point)
    if bits < 8:
        codes = codes.clamp_(128 - 2 ** (bits - 1), 127 + 2 ** (bits - 1))
    return codes, scale, zero_point + 128, None


# --- Triton (CUDA) ------------------------------------------------------------------------------------------


def _triton_linear(x, qweight, weight_scale, bias, input_scale, input_zero_point, bits) -> Tensor:
    """A convolution of one-pixel images."""
    pixels = x[:, :, None, None]
    weight = qweight[:, :, None, None]
    unit = ([1, 1], [0, 0], [1, 1])
    return _triton_windows(pixels, weight, qweight, weight_scale, bias, input_scale, input_zero_point, bits, *unit)[
        :, 0, 0
    ]


def _triton_conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (stride, padding, dilation)
    y = _triton_windows(x, qweight, qweight, weight_scale, bias, input_scale, input_zero_point, bits, *geometry)
    return y.permute(0, 3, 1, 2)


def _triton_windows(
    x, weight, owner, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation
) -> Tensor:
    """x [B, C, H, W] with channels innermost -> [B, OH, OW, N]; `owner` is the parameter behind `weight`."""
    from . import w8a8_triton

    if input_scale is None:
        input_scale = dynamic_scale(x, (1, 2, 3), bits).flatten()
        input_zero_point = torch.zeros((), dtype=torch.int32, device=x.device)
    pixels = x.permute(0, 2, 3, 1).contiguous()
    codes = w8a8_triton.quantize(pixels, input_scale, input_zero_point, bits)
    rows = _prepared(owner, "nhwc", lambda: weight.permute(0, 2, 3, 1).contiguous())
    sums = _prepared(owner, "sums", lambda: weight.flatten(1).sum(1, dtype=torch.int32))
    size = _output_size(x, weight, stride, padding, dilation)
    out = x.new_empty(len(x), *size, len(weight))
    return w8a8_triton.conv2d(
        codes, rows, input_scale, input_zero_point, weight_scale, sums, bias, out, stride, padding, dilation
    )


# --- shared -------------------------------------------------------------------------------------------------

_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _prepared(qweight: Tensor, key, build) -> Tensor:
    """A kernel's own layout of a weight (int8 too), made once and dropped with the weight or when it changes."""
    version = (qweight.data_ptr(), 0 if qweight.is_inference() else qweight._version)
    entry = _cache.get(qweight)
    if entry is None or entry[0] != version:
        entry = _cache[qweight] = (version, {})
    if key not in entry[1]:
        entry[1][key] = build()
    return entry[1][key]


def _output_size(x, qweight, stride, padding, dilation) -> list[int]:
    kernel = qweight.shape[2:]
    return [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


_LINEAR = {REFERENCE: reference_linear, ONEDNN: _onednn_linear, TRITON: _triton_linear}
_CONV2D = {REFERENCE: reference_conv2d, ONEDNN: _onednn_conv2d, TRITON: _triton_conv2d}
