"""Products of 8-bit inputs with weights whose rows are stored in 4 or in 8 bits, as ops of torch.

    y[m, n] = s_x[m] sum_g s_w[n, g] sum_{k in g} (q_x[m, k] - z_x) (q_w[n, k] - z_w[n, g])  +  b[n]

z_w is 0 in rows of 8 bits. With one scale an output, codes of both widths are int8 operands of one product, which is
that of W8A8 layers: two products on fewer rows each would quantize x twice, and putting columns of y in their places
takes longer than a product.

    unpack + triton-int8        CUDA: the rows as int8 in memory for one call, then the W8A8 kernel;
                                scales of groups are folded into these, which rounds them (kernels/w4/int4_codes.py)
    onednn-int8 on an int8 copy x86 CPU, one scale an output: the W8A8 kernel on a copy that is kept
    reference                   everywhere else: the formula in float32 on dequantized weights; the truth

Which one: kernels/dispatch.py. Both widths in one launch (kernels/w4/row_mix.py) take 2.4 to 2.8 times as long as
4-bit rows alone on an H200, so no layer is served by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dispatch
from ..kernels.formats.grid import Grid
from ..kernels.runtime.ops import op
from ..kernels.runtime.prepared import prepared
from ..kernels.runtime.settings import remembered
from ..kernels.w4.int4_codes import int4_codes
from ..kernels.w8a8 import layer as w8a8
from . import int4_ops
from .int4 import pixel_first
from .int4_ops import windows


@remembered
def kernel_name(device: torch.device, group_size: int | None = None) -> str:
    """The kernel that serves a layer, whatever its inputs' grid."""
    return dispatch.find(dispatch.Query("row-mix", "int8", group_size, device=device)).name


@op
def row_mix_linear(
    x: Tensor,
    qweight: Tensor,
    qweight8: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    weight_scale: Tensor,
    places: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight uint8 [n, K'/2], qweight8 int8 [w, K], wscales, wzeros, weight_scale and places int32 [N] as in
    `RowMixLayer`; bias [N]; the input's grid as in `w8a8_linear`.
    """
    rows, inputs = (qweight, qweight8, wscales, wzeros, weight_scale, places), x.shape[-1]
    grid = (input_scale, input_zero_point, activation_bits)
    # Where there is nothing to compute, one path says which shape nothing has.
    name = _name(x.device, inputs, weight_scale) if x.numel() else w8a8.REFERENCE
    if name == w8a8.REFERENCE and weight_scale.ndim == 2:
        exact = int4_ops.rounded(x.reshape(-1, inputs), *grid, (1,))
        y = F.linear(exact, weight_of(*rows, inputs), None if bias is None else bias.float())
        return y.to(x.dtype).view(*x.shape[:-1], len(places))
    return w8a8.w8a8_linear(x, *_int8(*rows, inputs), bias, *grid)


@row_mix_linear.register_fake
def _(x: Tensor, qweight: Tensor, qweight8: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(qweight) + len(qweight8))


@op
def row_mix_conv2d(
    x: Tensor,
    qweight: Tensor,
    qweight8: Tensor,
    wscales: Tensor,
    wzeros: Tensor | None,
    weight_scale: Tensor,
    places: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """x [B, C, H, W] float -> [B, N, H', W'] channels_last in x's dtype; qweight8 is [w, C, kh, kw].

    Zero padding; the rest as in `row_mix_linear`, with dynamic scales per sample.
    """
    channels, *kernel = qweight8.shape[1:]
    rows, inputs = (qweight, qweight8, wscales, wzeros, weight_scale, places), channels * kernel[0] * kernel[1]
    grid, geometry = (
        (input_scale, input_zero_point, activation_bits),
        (list(stride), list(padding), list(dilation), 1),
    )
    if _name(x.device, inputs, weight_scale) == w8a8.REFERENCE and weight_scale.ndim == 2:
        exact, weight = int4_ops.rounded(x, *grid, (1, 2, 3)), windows(weight_of(*rows, inputs), kernel)
        y = F.conv2d(exact, weight, None if bias is None else bias.float(), *geometry)
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return w8a8.w8a8_conv2d(x, *_int8(*rows, inputs, kernel), bias, *grid, *geometry)


@row_mix_conv2d.register_fake
def _(x: Tensor, qweight: Tensor, qweight8: Tensor, *rest: Any) -> Tensor:
    *_, stride, padding, dilation = rest
    return w8a8.empty_images(x, len(qweight) + len(qweight8), qweight8.shape[2:], stride, padding, dilation)


def _name(device: torch.device, inputs: int, weight_scale: Tensor) -> str:
    return kernel_name(device, None if weight_scale.ndim == 1 else inputs // weight_scale.shape[1])


def weight_of(
    qweight: Tensor, qweight8: Tensor, wscales: Tensor, wzeros: Tensor | None, weight_scale: Tensor, places: Tensor,
    inputs: int,
) -> Tensor:  # fmt: skip
    """The float32 weight [N, K] that the codes stand for."""
    scales = weight_scale[:, None] if weight_scale.ndim == 1 else weight_scale
    wide = Grid(scales, None, -127, 127).values(pixel_first(qweight8))
    return placed(torch.cat([int4_ops.weight_of(qweight, wscales, wzeros, inputs), wide]), places)


def _int8(
    qweight: Tensor, qweight8: Tensor, wscales: Tensor, wzeros: Tensor | None, weight_scale: Tensor, places: Tensor,
    inputs: int, kernel: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(int8 codes of all rows, [N, K] or `windows` of it, scales [N]): made for this call on a GPU, once on a CPU."""

    def build() -> tuple[Tensor, Tensor]:
        narrow, scales = int4_codes(qweight, wscales, wzeros, inputs)
        wide, wider = pixel_first(qweight8), weight_scale
        if wider.ndim == 2:
            wide, wider = _folded(wide, wider.float())
        codes = windows(placed(torch.cat([narrow, wide]), places), kernel)
        return codes, placed(torch.cat([scales, wider]), places)

    if qweight.is_cuda:
        return build()
    others = [qweight8] if wzeros is None else [qweight8, wzeros]
    codes = prepared(qweight, ("rows", inputs, *kernel), lambda: build()[0], *others)
    return codes, placed(torch.cat([wscales[:, 0], weight_scale]), places)


def _folded(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [w, K] under scales [w, G] -> codes under one scale a row, the largest, which rounds the others'."""
    channel = scales.amax(1, keepdim=True)
    steps = codes.unflatten(1, (scales.shape[1], -1)) * (scales / channel)[:, :, None]
    return steps.round_().to(torch.int8).flatten(1), channel[:, 0]


def placed(stored: Tensor, places: Tensor) -> Tensor:
    """Rows as they are stored, in the order of the layer's outputs."""
    return torch.empty_like(stored).index_copy_(0, places.long(), stored)
