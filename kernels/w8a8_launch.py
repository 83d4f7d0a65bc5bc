"""From tensors of a model to the launches of the Triton kernels: what is quantized where, and prepared once.

static, 1x1, at most 128 outputs    one kernel: floats quantized as they are loaded
static                              quantize; GEMM
dynamic                             largest values; quantize; GEMM
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8
from .int8 import weight_limit
from .prepared import prepared
from .window import Window

ON_LOAD_OUTPUTS = 128  # more outputs than one tile has would quantize the same floats again


def triton_linear(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, residual: Tensor | None = None
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype: a convolution of one-pixel images."""
    window = Window(len(x), 1, 1)
    image = x[:, :, None, None]
    residual = None if residual is None else residual[:, None, None]
    y = _windows(image, window, qweight, weight_scale, bias, input_scale, input_zero_point, bits, residual)
    return y.flatten(0, 2)


def triton_conv2d(
    x, qweight, weight_scale, bias, input_scale, input_zero_point, bits, stride, padding, dilation, groups
) -> Tensor:
    """x [B, C, H, W] -> [B, N, H', W'] channels_last in x's dtype; groups is 1."""
    window = Window(len(x), *x.shape[2:], tuple(qweight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    y = _windows(x, window, qweight, weight_scale, bias, input_scale, input_zero_point, bits, None)
    return y.permute(0, 3, 1, 2)


def _windows(x, window, qweight, weight_scale, bias, input_scale, input_zero_point, bits, residual) -> Tensor:
    from . import w8a8_quantize

    if x.shape[1] != qweight.shape[1]:
        raise ValueError(f"the input has {x.shape[1]} channels where the layer needs {qweight.shape[1]}.")
    plain = window.taps == 1 and window.padding == (0, 0)
    if input_scale is not None and plain and len(qweight) <= ON_LOAD_OUTPUTS:
        operand = x.permute(0, 2, 3, 1).contiguous()
    else:
        if input_scale is None:
            x = x if x.permute(0, 2, 3, 1).is_contiguous() else x.contiguous()
            limit = weight_limit(bits) if qweight.dtype == torch.int8 else fp8.LIMIT
            input_scale, input_zero_point = w8a8_quantize.scales(x, limit), None
        operand = w8a8_quantize.quantize(x, input_scale, input_zero_point, bits, qweight.dtype, window.padding)
    return multiply(
        operand, window, qweight, weight_scale, bias, input_scale, input_zero_point, bits, None, residual, x.dtype
    )


def multiply(
    operand, window, qweight, weight_scale, bias, input_scale, input_zero_point, bits, shift, residual, dtype,
    config=None,
) -> Tensor:  # fmt: skip
    """operand: codes in the flat layout, or floats [B, H, W, C] -> [B, H', W', N] of `dtype`.

    shift [B, N] and residual [B, H', W', N] are added in float32. config: a w8a8_configs.Config, not the usual one.

    Raises ValueError where shapes do not belong together: the kernel would read past the end.
    """
    from . import w8a8_triton

    _check(operand, window, qweight, shift, residual)
    weight = prepared(qweight, "rows", lambda: weight_rows(qweight))
    sums = None
    if input_zero_point is not None:
        sums = prepared(qweight, "sums", lambda: qweight.flatten(1).sum(1, dtype=torch.int32))
    out = torch.empty(window.batch, *window.output, len(qweight), dtype=dtype, device=operand.device)
    residual = None if residual is None else residual.contiguous()
    shift = None if shift is None else shift.contiguous()
    return w8a8_triton.conv2d(
        operand, window, weight, input_scale, input_zero_point, weight_scale, sums, bias, shift, residual, out, bits,
        config,
    )  # fmt: skip


def weight_rows(qweight: Tensor) -> Tensor:
    """[N, C, kh, kw] or [N, K] codes -> [N, taps * C'], channels innermost, C' = C up to a multiple of 32."""
    from .w8a8_quantize import stored_channels

    rows = qweight.permute(0, 2, 3, 1) if qweight.ndim == 4 else qweight
    extra = stored_channels(rows.shape[-1]) - rows.shape[-1]
    if extra:  # e4m3 through its bytes, which are zero for zero: pad does not know the type
        rows = F.pad(rows.view(torch.int8), (0, extra)).view(qweight.dtype)
    return rows.contiguous().flatten(1)


def _check(operand: Tensor, window: Window, qweight: Tensor, shift: Tensor | None, residual: Tensor | None) -> None:
    n, channels = qweight.shape[:2]
    if operand.ndim == 2:
        from .w8a8_quantize import stored_channels

        right = (window.rows, stored_channels(channels))
    else:
        right = (window.batch, window.h, window.w, channels)
    if tuple(operand.shape) != right:
        raise ValueError(f"the input has shape {list(operand.shape)} where the layer needs {list(right)}.")
    for name, given, size in (
        ("shift", shift, (window.batch, n)),
        ("residual", residual, (window.batch, *window.output, n)),
    ):
        if given is not None and tuple(given.shape) != size:
            raise ValueError(f"the {name} has shape {list(given.shape)} where the layer needs {list(size)}.")
