"""Products of 8-bit inputs with weights whose rows are stored in 4 or in 8 bits, as ops of torch.

    y[m, n] = s_x[m] sum_g s_w[n, g] sum_{k in g} (q_x[m, k] - z_x) (q_w[n, k] - z_w[n, g])  +  b[n]

z_w is 0 in rows of 8 bits. With one scale an output, codes of both widths are int8 operands of one product, which is
that of W8A8 layers: two products on fewer rows each would quantize x twice, and putting columns of y in their places
takes longer than a product.

    triton-w4a8-row-mix         CUDA, Linear, dynamic inputs, groups: rows of 4 bits, for wide ones two, in one launch
                                that scales sums of groups (kernels/w4/row_mix.py)
    unpack + triton-int8        CUDA, everything else: the rows as int8 in memory for one call, then the W8A8 kernel;
                                scales of groups are folded into these, which rounds them (kernels/w4/int4_codes.py)
    onednn-int8 on an int8 copy x86 CPU with VNNI, one scale an output: the W8A8 kernel on a copy that is kept
    cpu-w4a8                    x86 CPU, groups: both halves of wide rows as rows of 4 bits in the kernel for
                                those (kernels/cpu/), and their sum; rounds by 2^-24 of either
    reference                   everywhere else: the formula in float32 on dequantized weights; the truth

Which one: kernels/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from ..kernels.cpu import w4a8 as cpu
from ..kernels.cpu.w4a8_conv import cpu_w4a8_conv2d
from ..kernels.formats.grid import Grid
from ..kernels.formats.int4 import high_rows
from ..kernels.runtime.ops import op
from ..kernels.runtime.prepared import prepared
from ..kernels.runtime.settings import remembered
from ..kernels.w4 import integer
from ..kernels.w4.int4_codes import int4_codes
from ..kernels.w4.row_mix import codes_of, row_mix_grouped, zeros_of
from ..kernels.w8a8 import layer as w8a8
from . import int4_ops
from .int4_ops import windows


@remembered
def kernel_name(
    device: torch.device,
    linear: bool,
    inputs: int,
    group_size: int | None = None,
    static: bool = False,
    bits: int = 8,
) -> str:
    """The kernel that serves a layer of so many inputs; group_size: of those under one scale, None for all; bits: of
    its inputs."""
    linear = linear and bits == 8  # narrower grids of inputs are for the kernels that take any grid
    query = dispatch.Query("row-mix", "int8", group_size, device=device, static=static, linear=linear, inputs=inputs)
    return dispatch.find(query).name


@op
def row_mix_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    wide: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight uint8, wscales, wzeros and wide int32 [w] as in `RowMixLayer`; bias [N]; the input's grid as in
    `w8a8_linear`.
    """
    rows, inputs = (qweight, wscales, wzeros, wide), x.shape[-1]
    grid = (input_scale, input_zero_point, activation_bits)
    groups = wscales.shape[1]
    name = kernel_name(x.device, True, inputs, group_size(inputs, groups), input_scale is not None, activation_bits)
    # Where there is nothing to compute, one path says which shape nothing has.
    if groups > 1 and (name == w8a8.REFERENCE or not x.numel()):
        exact = int4_ops.rounded(x.reshape(-1, inputs), *grid, (1,))
        y = F.linear(exact, weight_of(*rows, inputs), None if bias is None else bias.float())
        return y.to(x.dtype).view(*x.shape[:-1], len(wscales))
    if name == integer.ROW_MIX:
        return row_mix_grouped(x, *rows, bias)
    if name == cpu.NAME and x.numel():
        return _whole(cpu.cpu_w4a8_linear(x, qweight, *_halves(wscales, wzeros, wide, bias), *grid), wide, -1)
    return w8a8.w8a8_linear(x, *_int8(*rows, inputs), bias, *grid)


@row_mix_linear.register_fake
def _(x: Tensor, qweight: Tensor, wscales: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(wscales))


@op
def row_mix_conv2d(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    wide: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """x [B, C, H, W] float -> [B, N, H', W'] channels_last in x's dtype.

    K = kh kw C, in this order; zero padding; the rest as in `row_mix_linear`, with dynamic scales per sample.
    """
    rows, inputs = (qweight, wscales, wzeros, wide), x.shape[1] * kernel[0] * kernel[1]
    grid, geometry = (
        (input_scale, input_zero_point, activation_bits),
        (list(stride), list(padding), list(dilation), 1),
    )
    groups = wscales.shape[1]
    name = kernel_name(x.device, False, inputs, group_size(inputs, groups), input_scale is not None, activation_bits)
    if groups > 1 and (name == w8a8.REFERENCE or not x.numel()):
        exact, weight = int4_ops.rounded(x, *grid, (1, 2, 3)), windows(weight_of(*rows, inputs), kernel)
        y = F.conv2d(exact, weight, None if bias is None else bias.float(), *geometry)
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    if name == cpu.NAME and x.numel():
        operands = _halves(wscales, wzeros, wide, bias)
        return _whole(cpu_w4a8_conv2d(x, qweight, *operands, *grid, list(kernel), *geometry[:3]), wide, 1)
    return w8a8.w8a8_conv2d(x, *_int8(*rows, inputs, kernel), bias, *grid, *geometry)


@row_mix_conv2d.register_fake
def _(x: Tensor, qweight: Tensor, wscales: Tensor, *rest: Any) -> Tensor:
    *_, kernel, stride, padding, dilation = rest
    return w8a8.empty_images(x, len(wscales), kernel, stride, padding, dilation)


def group_size(inputs: int, groups: int) -> int | None:
    """Inputs of a group; None for one scale an output."""
    return None if groups == 1 else inputs // groups


def weight_of(qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, wide: Tensor, inputs: int) -> Tensor:
    """The float32 weight [N, K] that the codes stand for."""
    zeros = None if wzeros is None else zeros_of(wzeros, wide)
    return Grid(wscales, zeros, -127, 127).values(codes_of(qweight, wide, inputs))


def _halves(wscales: Tensor, wzeros: Tensor | None, wide: Tensor, bias: Tensor | None) -> tuple:
    """(scales, zero points, no steps, bias) of all stored rows, high halves first: c = 16 h + (l - (-8))."""
    index, high = wide.long(), high_rows(len(wide))
    scales = wscales.float()
    first = F.pad(16 * scales[index], (0, 0, 0, high - len(wide)), value=1.0)
    zeros = zeros_of(wscales.new_zeros(len(wscales) - len(wide), wscales.shape[1], dtype=torch.int8)
                     if wzeros is None else wzeros, wide)  # fmt: skip
    zeros = F.pad(zeros.index_fill(0, index, -8), (0, 0, high, 0))
    return torch.cat([first, scales]), zeros, None, None if bias is None else F.pad(bias, (high, 0))


def _whole(halves: Tensor, wide: Tensor, axis: int) -> Tensor:
    """Outputs of all stored rows on an axis -> the layer's outputs, wide ones the sum of their halves."""
    high = high_rows(len(wide))
    low = halves.narrow(axis, high, halves.shape[axis] - high)
    return low.index_add(axis, wide, halves.narrow(axis, 0, len(wide)))


def _int8(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, wide: Tensor, inputs: int, kernel: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """(int8 codes of all rows, [N, K] or `windows` of it, scales [N]): made for this call on a GPU, once on a CPU."""

    def build() -> tuple[Tensor, Tensor]:
        index = wide.long()
        zeros = None if wzeros is None else zeros_of(wzeros, wide)
        codes, scales = int4_codes(qweight[high_rows(len(wide)) :], wscales, zeros, inputs)
        wides, wider = codes_of(qweight, wide, inputs)[index], wscales[index].float()
        wides, wider = _folded(wides, wider) if wider.shape[1] > 1 else (wides, wider[:, 0])
        return windows(codes.index_copy(0, index, wides), kernel), scales.index_copy(0, index, wider)

    if qweight.is_cuda:
        return build()
    others = [] if wzeros is None else [wzeros]
    codes = prepared(qweight, ("rows", inputs, *kernel), lambda: build()[0], *others)
    return codes, wscales[:, 0].float()


def _folded(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [w, K] under scales [w, G] -> codes under one scale a row, the largest, which rounds the others'."""
    channel = scales.amax(1, keepdim=True)
    steps = codes.unflatten(1, (scales.shape[1], -1)) * (scales / channel)[:, :, None]
    return steps.round_().to(torch.int8).flatten(1), channel[:, 0]
