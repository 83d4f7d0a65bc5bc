"""Products of 8-bit inputs with weights whose rows are stored in 4 or in 8 bits, as ops of torch.

    y[m, n] = s_x[m] s_w[n] sum_k (q_x[m, k] - z_x) q_w[n, k]  +  b[n]

Codes of both widths are int8 operands of one product, which is that of W8A8 layers: two products on fewer rows each
would quantize x twice, and putting columns of y in their places takes longer than a product.

    unpack + triton-int8        CUDA: the rows as int8 in memory for one call, then the W8A8 kernel
    onednn-int8 on an int8 copy x86 CPU: the W8A8 kernel on a copy that is kept
    reference                   everywhere else

Which one: kernels/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.runtime.ops import op
from ..kernels.runtime.prepared import prepared
from ..kernels.w4.int4_codes import int4_codes
from ..kernels.w8a8 import layer as w8a8
from .int4 import pixel_first
from .int4_ops import windows


def kernel_name(device: torch.device) -> str:
    """The kernel that serves a layer; narrower grids of inputs have the same."""
    return dispatch.find(dispatch.Query("row-mix", "int8", device=device)).name


@op
def row_mix_linear(
    x: Tensor,
    qweight: Tensor,
    qweight8: Tensor,
    wscales: Tensor,
    weight_scale: Tensor,
    places: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    activation_bits: int,
) -> Tensor:
    """x [..., K] float -> [..., N] in x's dtype.

    qweight uint8 [n, K'/2], qweight8 int8 [w, K], wscales [n, 1] and weight_scale [w] float32, places int32 [N],
    as in `RowMixLayer`; bias [N]; the input's grid as in `w8a8_linear`.
    """
    codes = _codes(qweight, qweight8, wscales, places, x.shape[-1])
    scales = placed(torch.cat([wscales[:, 0], weight_scale]), places)
    return w8a8.w8a8_linear(x, codes, scales, bias, input_scale, input_zero_point, activation_bits)


@row_mix_linear.register_fake
def _(x: Tensor, qweight: Tensor, qweight8: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(qweight) + len(qweight8))


@op
def row_mix_conv2d(
    x: Tensor,
    qweight: Tensor,
    qweight8: Tensor,
    wscales: Tensor,
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
    weight = _codes(qweight, qweight8, wscales, places, channels * kernel[0] * kernel[1], kernel)
    scales = placed(torch.cat([wscales[:, 0], weight_scale]), places)
    grid = (input_scale, input_zero_point, activation_bits)
    return w8a8.w8a8_conv2d(x, weight, scales, bias, *grid, list(stride), list(padding), list(dilation), 1)


@row_mix_conv2d.register_fake
def _(x: Tensor, qweight: Tensor, qweight8: Tensor, *rest: Any) -> Tensor:
    *_, stride, padding, dilation = rest
    return w8a8.empty_images(x, len(qweight) + len(qweight8), qweight8.shape[2:], stride, padding, dilation)


def _codes(
    qweight: Tensor, qweight8: Tensor, wscales: Tensor, places: Tensor, inputs: int, kernel: Sequence[int] = ()
) -> Tensor:
    """int8 codes of all rows, [N, K] or `windows` of them: made for this call on a GPU, once on a CPU."""

    def build() -> Tensor:
        narrow, _ = int4_codes(qweight, wscales, None, inputs)
        return windows(placed(torch.cat([narrow, pixel_first(qweight8)]), places), kernel)

    if qweight.is_cuda:
        return build()
    return prepared(qweight, ("rows", inputs, *kernel), build, qweight8)


def placed(stored: Tensor, places: Tensor) -> Tensor:
    """Rows as they are stored, in the order of the layer's outputs."""
    return torch.empty_like(stored).index_copy_(0, places.long(), stored)
