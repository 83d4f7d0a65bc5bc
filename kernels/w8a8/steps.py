"""From tensors of a model to the launches of the Triton kernels: what is quantized where, and prepared once.

static, 1x1, at most 128 outputs    one kernel: floats quantized as they are loaded
static, or a fixed scale a row      quantize; GEMM
dynamic, rows of tokens             quantize, which finds the largest values too; GEMM
dynamic, images                     largest values; quantize; GEMM
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import fp8
from ..formats.int8 import weight_limit
from ..runtime.late import late
from ..runtime.prepared import prepared
from .configs import Config
from .window import Window, same_window

if TYPE_CHECKING:
    from . import product, quantize
else:
    late(globals(), "product", "quantize")

ON_LOAD_OUTPUTS = 128  # more outputs than one tile has would quantize the same floats again


class Parameters(NamedTuple):
    """A layer beside its geometry, as the W8A8 ops take it; a dataclass would take four times as long to make.

    qweight [N, C, kh, kw] or [N, K] codes, weight_scale [N] float32, bias [N] or None. input_scale float32 and
    input_zero_point int32, of one element; a scale of [B] elements is one for each image; None for a scale that is
    found in the call. bits: of the activation's codes.
    """

    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bits: int = 8


def triton_linear(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, residual: Tensor | None = None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype: a convolution of one-pixel images."""
    m, n = x.shape[0], qweight.shape[0]
    residual = None if residual is None else residual.view(m, 1, 1, n)
    image, window = x.view(m, -1, 1, 1), same_window(m, 1, 1)
    layer = Parameters(qweight, weight_scale, bias, input_scale, input_zero_point, bits)
    return _windows(image, window, layer, residual).view(m, n)


def triton_conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    """x [B, C, H, W] -> [B, N, H', W'] channels_last in x's dtype; groups is 1."""
    batch, _, h, w = x.shape
    window = same_window(batch, h, w, qweight.shape[2:], tuple(stride), tuple(padding), tuple(dilation))
    layer = Parameters(qweight, weight_scale, bias, input_scale, input_zero_point, bits)
    return _windows(x, window, layer, None).permute(0, 3, 1, 2)


def _windows(x: Tensor, window: Window, layer: Parameters, residual: Tensor | None) -> Tensor:
    qweight, weight_scale, bias, input_scale, input_zero_point, bits = layer
    if x.shape[1] != qweight.shape[1]:
        raise ValueError(f"the input has {x.shape[1]} channels where the layer needs {qweight.shape[1]}.")
    plain = window.taps == 1 and window.padding == (0, 0)
    one_scale = input_scale is not None and input_scale.numel() == 1
    if one_scale and plain and qweight.shape[0] <= ON_LOAD_OUTPUTS:
        return multiply(x.permute(0, 2, 3, 1).contiguous(), window, layer, x.dtype, None, residual)
    if input_scale is None and plain and (window.h, window.w) == (1, 1):
        codes, scale = quantize.quantize_rows(x[:, :, 0, 0], bits, qweight.dtype)
        layer = Parameters(qweight, weight_scale, bias, scale, None, bits)
        return multiply(codes, window, layer, x.dtype, None, residual)
    if input_scale is None:
        x = x if x.permute(0, 2, 3, 1).is_contiguous() else x.contiguous()
        limit = weight_limit(bits) if qweight.dtype == torch.int8 else fp8.LIMIT
        input_scale, input_zero_point = quantize.scales(x, limit), None
        layer = Parameters(qweight, weight_scale, bias, input_scale, input_zero_point, bits)
    codes = quantize.quantize(x, input_scale, input_zero_point, bits, qweight.dtype, window.padding)
    return multiply(codes, window, layer, x.dtype, None, residual)


def multiply(
    operand: Tensor,
    window: Window,
    layer: Parameters,
    dtype: torch.dtype,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    config: Config | None = None,
    nonlinearity: str = "",
) -> Tensor:
    """operand: codes in the flat layout, or floats [B, H, W, C] -> [B, H', W', N] of `dtype`.

    shift [B, N] and residual [B, H', W', N] are added in float32, the latter after the nonlinearity. config: not the
    usual one.

    Raises ValueError where shapes do not belong together: the kernel would read past the end.
    """
    qweight, weight_scale, bias, input_scale, input_zero_point, bits = layer
    _check(operand.shape, window, qweight.shape, *(None if t is None else t.shape for t in (shift, residual)))
    weight = prepared(qweight, "rows", lambda: weight_rows(qweight))
    sums = None
    if input_zero_point is not None:
        sums = prepared(qweight, "sums", lambda: qweight.flatten(1).sum(1, dtype=torch.int32))
    out = operand.new_empty(window.batch, *window.output, qweight.shape[0], dtype=dtype)
    residual = None if residual is None else residual.contiguous()
    shift = None if shift is None else shift.contiguous()
    return product.conv2d(
        operand, window, weight, input_scale, input_zero_point, weight_scale, sums, bias, shift, residual, out, bits,
        config, nonlinearity,
    )  # fmt: skip


def weight_rows(qweight: Tensor) -> Tensor:
    """[N, C, kh, kw] or [N, K] codes -> [N, taps * C'], channels innermost, C' = C up to a multiple of 32."""
    rows = qweight.permute(0, 2, 3, 1) if qweight.ndim == 4 else qweight
    extra = quantize.stored_channels(rows.shape[-1]) - rows.shape[-1]
    if extra:  # e4m3 through its bytes, which are zero for zero: pad does not know the type
        rows = F.pad(rows.view(torch.int8), (0, extra)).view(qweight.dtype)
    return rows.contiguous().flatten(1)


@functools.lru_cache(maxsize=4096)
def _check(operand, window: Window, weight, shift, residual) -> None:
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    n, channels = weight[:2]
    if len(operand) == 2:
        right = (window.rows, quantize.stored_channels(channels))
    else:
        right = (window.batch, window.h, window.w, channels)
    if tuple(operand) != right:
        raise ValueError(f"the input has shape {list(operand)} where the layer needs {list(right)}.")
    for name, given, size in (
        ("shift", shift, (window.batch, n)),
        ("residual", residual, (window.batch, *window.output, n)),
    ):
        if given is not None and tuple(given) != size:
            raise ValueError(f"the {name} has shape {list(given)} where the layer needs {list(size)}.")
