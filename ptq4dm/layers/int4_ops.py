"""Products of 8-bit inputs with plain 4-bit weights, as ops of torch.

    y[m, n] = s_x[m] sum_g s_w[n, g] sum_{k in g} (q_x[m, k] - z_x) (q_w[n, k] - z_w[n, g])  +  b[n]

Of a codebook a level t[q_w[n, k]] stands in the place of q_w - z_w.

    triton-w4a8-int8            CUDA, Linear, dynamic inputs, symmetric groups of 64 or 128
    triton-w4a8-grouped         CUDA, Linear, dynamic inputs, groups with zero points
    triton-w4a8-channel         CUDA, Linear, dynamic inputs, one scale an output
    triton-w4a8-codebook        CUDA, Linear, dynamic inputs, a codebook
    triton-w4a16                CUDA, Linear, up to 32 rows of bf16 or fp16 that are taken as they are, groups of 64
                                or 128, of a codebook too: unpacked in the product
    unpack + cublas, + cudnn    CUDA, other inputs that are taken as they are: weights as floats of their type in
                                memory for one call, then the product of Linear layers, and of convolutions
    unpack + triton-int8        CUDA, everything else: weights as int8 in memory for one call, then the W8A8 kernel
    cpu-w4a8                    x86 CPU: 4-bit codes in a kernel that is compiled here (kernels/cpu/)
    onednn-int8 on an int8 copy x86 CPU, one scale an output, where that one does not serve: the W8A8 kernel on a copy
                                that is kept
    reference                   everywhere: the formula in float32 on dequantized weights; the truth

Which one: kernels/dispatch.py.

Where kernels on a GPU unpack, as triton-w4a8-int8 does too, they fold the scales of groups into 8-bit weights
(kernels/w4/int4_codes.py says what that rounds); everything else is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from ..kernels.cpu import w4a8 as cpu
from ..kernels.cpu.w4a8_conv import cpu_w4a8_conv2d
from ..kernels.formats.codebook import CodebookGrid
from ..kernels.formats.grid import Grid
from ..kernels.formats.int4 import GROUP, pack_int4, unpack_int4
from ..kernels.runtime.ops import op
from ..kernels.runtime.prepared import prepared
from ..kernels.runtime.settings import remembered
from ..kernels.w4 import integer
from ..kernels.w4 import layer as w4
from ..kernels.w4.grouped import grouped_linear
from ..kernels.w4.int4_codes import int4_codes
from ..kernels.w4.int4_floats import FLOATS, int4_floats
from ..kernels.w8a8 import layer as w8a8
from ..kernels.w8a8 import reference
from .plan import FLOAT_INPUTS

HALVES = (torch.bfloat16, torch.float16)
PACKED = GROUP  # codes that are packed together; rows are filled up to a multiple of it


@remembered
def kernel_name(
    device: torch.device,
    linear: bool,
    inputs: int,
    scales: int,
    affine: bool,
    static: bool,
    bits: int,
    groups: int,
    progressive: bool = False,
    few: bool = False,
    codebook: bool = False,
) -> str:
    """The kernel that serves a layer of K = `inputs` with `scales` per output; groups: those of a convolution.

    few: for up to SHORT rows of bf16 or fp16, where inputs are taken as they are.
    """
    query = dispatch.Query(
        "codebook" if codebook else "int4",
        "none" if bits == FLOAT_INPUTS else "int8",
        None if scales == 1 else inputs // scales,
        groups,
        w4.SHORT if few else None,
        device=device,
        static=static,
        zeros=affine,
        progressive=progressive,
        # On a GPU narrower grids of inputs are for the kernels that take any grid.
        linear=linear and (bits in (8, FLOAT_INPUTS) or device.type == "cpu"),
        inputs=inputs,
    )
    return dispatch.find(query).name


def packed_rows(codes: Tensor) -> Tensor:
    """codes int8 [n, K] in 4 bits -> uint8 [n, K'/2], K' = K up to a multiple of PACKED."""
    return pack_int4(F.pad(codes, (0, -codes.shape[1] % PACKED)), PACKED)


def unpacked_rows(packed: Tensor, inputs: int) -> Tensor:
    """The inverse of `packed_rows`: int8 [n, inputs]."""
    return unpack_int4(packed, PACKED)[:, :inputs]


def weight_of(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, levels: Tensor | None = None
) -> Tensor:
    """The float32 weight [N, K] that the codes stand for."""
    grid = Grid(wscales, wzeros, -8, 7) if levels is None else CodebookGrid(wscales, levels)
    return grid.values(unpacked_rows(qweight, inputs))


def windows(matrix: Tensor, kernel: Sequence[int]) -> Tensor:
    """Rows [N, K], K = kh kw C in this order, as the weight of a convolution: a view [N, C, kh, kw]. Without a kernel
    as they are.

    A kernel in another order of its own is kept with this view (`prepared`): where codes are kept, keep their view.
    """
    if not kernel:
        return matrix
    return matrix.view(len(matrix), *kernel, matrix.shape[1] // math.prod(kernel)).permute(0, 3, 1, 2)


@op
def int4_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    levels: Tensor | None = None,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight uint8 [N, K'/2], K' = K up to a multiple of 64, as `int4.pack_int4` has it in groups of 64; wscales [N, G]
    float, wzeros [N, G] int8 or None; bias [N]; the input's grid as in `w8a8_linear`; levels int8 [1, 16] or [N, 16]
    of a codebook, or None.
    """
    inputs, scales = x.shape[-1], wscales.shape[1]
    static = input_scale is not None
    few = activation_bits == FLOAT_INPUTS and x.dtype in HALVES and x.numel() <= w4.SHORT * inputs
    books = levels is not None
    name = kernel_name(
        x.device, True, inputs, scales, wzeros is not None, static, activation_bits, 1, False, few, books
    )
    weight = (qweight, wscales, wzeros)
    grid = (input_scale, input_zero_point, activation_bits)
    if name == w8a8.REFERENCE or not x.numel():
        rows = rounded(x.reshape(-1, inputs), *grid, (1,))
        y = F.linear(rows, weight_of(*weight, inputs, levels), None if bias is None else bias.float())
        return y.to(x.dtype).view(*x.shape[:-1], len(qweight))
    if name == w4.WEIGHT_ONLY:
        y = w4.few_rows(x.reshape(-1, inputs), *weight, bias, levels)
        return y.view(*x.shape[:-1], len(qweight))
    if name == dispatch.CUBLAS:
        y = F.linear(_floats(x), *_float_weight(x, *weight, bias, inputs, levels))
        return y.to(x.dtype)
    if name == w4.INT8:
        spread = prepared(wscales, PACKED, lambda: per_packed(wscales, inputs))
        return w4.svdq_linear(x, qweight, spread, None, None, None, bias, "int8", 0.0)
    if name in (integer.GROUPED, integer.CHANNEL, integer.CODEBOOK):
        return grouped_linear(x, *weight, bias, levels)
    if name == cpu.NAME:
        return cpu.cpu_w4a8_linear(x, *weight, None, bias, *grid)
    codes, scale = _int8(*weight, inputs, (), levels)
    return w8a8.w8a8_linear(x, codes, scale, bias, *grid)


@int4_linear.register_fake
def _(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(qweight))


@op
def int4_conv2d(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    levels: Tensor | None = None,
) -> Tensor:
    """x [B, C, H, W] float -> [B, N, H', W'] channels_last in x's dtype.

    K = kh kw C / groups, in this order of pixels and channels; zero padding; the rest as in `int4_linear`, with
    dynamic scales per sample.
    """
    channels = x.shape[1] // groups
    inputs = channels * kernel[0] * kernel[1]
    static = input_scale is not None
    affine = wzeros is not None
    name = kernel_name(
        x.device,
        False,
        inputs,
        wscales.shape[1],
        affine,
        static,
        activation_bits,
        groups,
        codebook=levels is not None,
    )
    grid = (input_scale, input_zero_point, activation_bits)
    geometry = (list(stride), list(padding), list(dilation), groups)
    if name == w8a8.REFERENCE or not x.numel():
        weight = windows(weight_of(qweight, wscales, wzeros, inputs, levels), kernel)
        pixels = rounded(x, *grid, (1, 2, 3))
        y = F.conv2d(pixels, weight, None if bias is None else bias.float(), *geometry)
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    if name == cpu.NAME:
        weight = (qweight, wscales, wzeros, None)
        return cpu_w4a8_conv2d(x, *weight, bias, *grid, list(kernel), *geometry[:3])
    if name == dispatch.CUDNN:
        matrix, bias = _float_weight(x, qweight, wscales, wzeros, bias, inputs, levels)
        y = F.conv2d(_floats(x), windows(matrix, kernel), bias, *geometry)
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    codes, scale = _int8(qweight, wscales, wzeros, inputs, kernel, levels)
    return w8a8.w8a8_conv2d(x, codes, scale, bias, *grid, *geometry)


@int4_conv2d.register_fake
def _(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    kernel, stride, padding, dilation = rest[6:10]
    return w8a8.empty_images(x, len(qweight), kernel, stride, padding, dilation)


def _int8(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, kernel: Sequence[int] = (),
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(int8 weight, [N, K] or `windows` of it, scales [N]): made for this call on a GPU, once on a CPU (one scale an
    output)."""
    if qweight.is_cuda:
        codes, scales = int4_codes(qweight, wscales, wzeros, inputs, levels)
        return windows(codes, kernel), scales
    make = lambda: windows(int4_codes(qweight, wscales, wzeros, inputs, levels)[0], kernel)  # noqa: E731
    others = () if levels is None else (levels,)
    return prepared(qweight, (inputs, *kernel), make, *others), wscales[:, 0].float()


def _floats(x: Tensor) -> Tensor:
    """x in the type of its product with floats: as it is, but for float64."""
    return x if x.dtype in FLOATS else x.float()


def _float_weight(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    bias: Tensor | None,
    inputs: int,
    levels: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(weight [N, K], bias) in the type of `_floats(x)`, made for this call."""
    kind = x.dtype if x.dtype in FLOATS else torch.float32
    weight = int4_floats(qweight, wscales, wzeros, inputs, kind, levels)
    return weight, None if bias is None else bias.to(kind)


def per_packed(wscales: Tensor, inputs: int) -> Tensor:
    """Scales [N, K / 64] of scales [N, G] that reach at least as far."""
    return wscales.repeat_interleave(inputs // PACKED // wscales.shape[1], 1).contiguous()


def rounded(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, dims: tuple) -> Tensor:
    """What the 8-bit codes of x stand for, float32; of inputs of 16 bits x itself."""
    if bits == FLOAT_INPUTS:
        return x.float()
    codes, scale = reference.centred_codes(x.float(), torch.int8, scale, zero_point, bits, dims)
    return codes * scale
