"""The two products of training on integers: a convolution, and its gradient by the weight. int8 operands, int32 sums.

    y[b, o, n]     = f[b] v[n] sum_{tap, c} x[b, pixel(o) + tap, c] w[n, tap, c]  +  bias[n]
    g[n, tap, c]   = sum_{b, o} d[b, o, n] x[b, pixel(o) + tap, c]

Images are [B, H, W, C], their padding zeros; a Linear layer is a convolution of one pixel on images of one line, its
tokens. The gradient by the input is a convolution too (`transposed.py`). Which kernel runs is decided by
`kernel_name`, from device and window:

    triton-int8     CUDA: the implicit GEMM of w8a8/product.py; weight_gradient.py
    onednn-int8     x86 CPU with VNNI, windows of more than one pixel
    int-mm          the same CPU, windows of one pixel, and every gradient by a weight: torch._int_mm, the windows
                    copied one beside the other
    exact-float32   any other CPU, where torch._int_mm takes some 20 times as long as a product of floats: codes as
                    float32, in parts of at most 1024 terms, whose sums float32 has without rounding, as 128 * 128 *
                    1024 = 2^24; parts are summed as int32

All sums are exact; tests compare them with float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.shift import TERMS
from ..runtime.late import late
from ..runtime.ops import op
from ..w8a8 import steps
from ..w8a8.layer import ONEDNN, TRITON
from ..w8a8.layer import kernel_name as w8a8_kernel
from ..w8a8.reference import images
from ..w8a8.window import Window, same_window

if TYPE_CHECKING:
    from . import weight_gradient
else:
    late(globals(), "weight_gradient")

INT_MM, EXACT = "int-mm", "exact-float32"
PART = 1024  # products of 8-bit codes whose sums, in any order, are whole numbers of at most 2^24


def kernel_name(device: torch.device, kernel: Sequence[int]) -> str:
    """The kernel that serves a convolution with a window of such a size."""
    name = w8a8_kernel(device)
    if name == TRITON or (name == ONEDNN and tuple(kernel) != (1, 1)):
        return name
    return INT_MM if name == ONEDNN else EXACT


@op
def shift_conv2d(
    x: Tensor,
    weight: Tensor,
    x_steps: Tensor,
    weight_steps: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """x [B, H, W, C] int8, weight [N, kh, kw, C] int8, x_steps [B], weight_steps [N] float32 (f and v above), bias
    [N] -> [B, H', W', N] of dtype, contiguous.

    Raises ValueError for operands that are not int8, or whose sums may pass an int32.
    """
    window = _window(x, weight.shape[1:3], stride, padding, dilation)
    _check(x, weight, weight[0].numel())
    kernel = _CONVOLUTIONS[kernel_name(x.device, window.kernel)] if x.numel() else _multiplied
    # oneDNN and Triton read steps as they lie in memory, those of an expanded tensor, too
    return kernel(x, weight, x_steps.contiguous(), weight_steps.contiguous(), bias, window, dtype)


@shift_conv2d.register_fake
def _(x, weight, x_steps, weight_steps, bias, stride, padding, dilation, dtype):
    window = _window(x, weight.shape[1:3], stride, padding, dilation)
    return x.new_empty(len(x), *window.output, len(weight), dtype=dtype)


@op
def shift_weight_gradient(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """gradient [B, H', W', N] int8, x [B, H, W, C] int8 -> [N, kh, kw, C] int32.

    Raises ValueError for operands that are not int8, or whose sums may pass an int32: take fewer rows
    (`rows_at_once`).
    """
    window = _window(x, kernel, stride, padding, dilation)
    n, c = gradient.shape[3], x.shape[3]
    _check(gradient, x, gradient.numel() // max(n, 1))
    if w8a8_kernel(x.device) == TRITON and x.numel():
        return weight_gradient.weight_gradient(gradient, x, window)
    sums = _sums(gradient.reshape(-1, n).T, _windows(x, window))
    return sums.view(n, *window.kernel, c)


@shift_weight_gradient.register_fake
def _(gradient, x, kernel, stride, padding, dilation):
    return x.new_empty(gradient.shape[3], *kernel, x.shape[3], dtype=torch.int32)


def rows_at_once(pixels: int) -> int:
    """How many samples of so many output pixels a weight's gradient may be summed over in an int32."""
    return max(1, TERMS // pixels)


def _window(x: Tensor, kernel, stride, padding, dilation) -> Window:
    return same_window(len(x), *x.shape[1:3], tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


def _check(a: Tensor, b: Tensor, terms: int) -> None:
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"operands must be int8, and are {a.dtype} and {b.dtype}.")
    if terms > TERMS:
        raise ValueError(f"sums of {terms} products of 8-bit codes may pass an int32 (at most {TERMS}).")


def _windows(x: Tensor, window: Window) -> Tensor:
    """The windows of x [B, H, W, C], one a row: [B H' W', kh kw C], copied unless they are of one pixel."""
    (ph, pw), (kh, kw), (sh, sw), (dh, dw) = window.padding, window.kernel, window.stride, window.dilation
    c = x.shape[3]
    x = (F.pad(x, (0, 0, pw, pw, ph, ph)) if ph or pw else x).contiguous()
    b, y, row, pixel = x.stride()
    size = (len(x), *window.output, kh, kw, c)
    return x.as_strided(size, (b, y * sh, row * sw, y * dh, row * dw, pixel)).reshape(-1, kh * kw * c)


def _multiplied(x, weight, x_steps, weight_steps, bias, window, dtype) -> Tensor:
    """Sums in int32, then the steps."""
    sums = _sums(_windows(x, window), weight.flatten(1).T)
    y = sums.view(len(x), -1, len(weight)) * (x_steps[:, None] * weight_steps)[:, None]
    y = y if bias is None else y.add_(bias)
    return y.view(len(x), *window.output, -1).to(dtype)


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] and b [K, N] int8 -> a b [M, N] int32, exactly."""
    return torch._int_mm(a, b) if kernel_name(a.device, (1, 1)) == INT_MM else exact_sums(a, b)


def exact_sums(a: Tensor, b: Tensor) -> Tensor:
    """The same by products of float32, in parts of K; autocast, which would round codes' sums, is kept away."""
    sums = torch.zeros(len(a), b.shape[1], dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, a.shape[1], PART):
            part = slice(start, start + PART)
            sums += (a[:, part].float() @ b[part].float()).int()
    return sums


def _onednn(x, weight, x_steps, weight_steps, bias, window, dtype) -> Tensor:
    """oneDNN's u8 x s8 convolution: codes + 128 with zero point 128. The samples' steps come after it."""
    geometry = [list(pair) for pair in (window.stride, window.padding, window.dilation)]
    channels = weight.permute(0, 3, 1, 2)
    packed = torch.ops.onednn.qconv_prepack(channels, weight_steps, 1.0, 128, *geometry, 1, None)
    codes = (x.view(torch.uint8) ^ 128).permute(0, 3, 1, 2)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    y = torch.ops.onednn.qconv2d_pointwise(
        codes, 1.0, 128, packed, weight_steps, zeros, None, *geometry, 1, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    y = y.permute(0, 2, 3, 1).mul_(x_steps[:, None, None, None])
    return (y if bias is None else y.add_(bias)).to(dtype).contiguous()


def _triton(x, weight, x_steps, weight_steps, bias, window, dtype) -> Tensor:
    """The W8A8 kernel on codes that are there already, one step a sample."""
    out = x.new_empty(window.batch, *window.output, len(weight), dtype=dtype)
    rows = steps.weight_rows(weight.permute(0, 3, 1, 2))
    operand = _flat(x, window)
    return steps.product.conv2d(operand, window, rows, x_steps, None, weight_steps, None, bias, None, None, out)


def _flat(x: Tensor, window: Window) -> Tensor:
    """Images as rows of channels, zeros where padding is and up to a multiple of 32 channels (w8a8/window.py)."""
    c = x.shape[3]
    if window.padding == (0, 0) and c % 32 == 0:
        return x.contiguous().view(-1, c)
    flat = x.new_zeros(window.rows, -(-c // 32) * 32)
    images(flat, window, c).copy_(x.permute(0, 3, 1, 2))
    return flat


_CONVOLUTIONS = {INT_MM: _multiplied, EXACT: _multiplied, ONEDNN: _onednn, TRITON: _triton}
