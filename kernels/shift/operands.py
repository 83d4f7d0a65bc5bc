"""Tensors in codes as the products on a GPU read them, and these products: the ops of training on integers there.

    shift_images          floats to codes, once for both products that a tensor is in (rounding.py)
    shift_weight          the same of a weight
    shift_flat_conv2d     y[b, o, n] = f[b] v[n] sum_{tap, c} x w + bias: the implicit GEMM of w8a8/product.py
    shift_over_rows       g[n, tap, c] = u[n] t[c] sum_{b, o} d x (over_rows.py)

On a CPU they are formulas in torch: the truth for the kernels, and not how a CPU trains (products.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import shift
from ..runtime.integers import cdiv
from ..runtime.late import late
from ..runtime.ops import op
from ..w8a8 import steps
from ..w8a8.reference import images
from ..w8a8.window import Window, same_window
from .noise import ROWS, noise_of
from .products import _multiplied, _windows

if TYPE_CHECKING:
    from . import over_rows, rounding
else:
    late(globals(), "over_rows", "rounding")

CHANNELS = 32
POINT = (1, 1)


@op
def shift_images(
    x: Tensor, bits: int, groups: int, padding: Sequence[int], seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, H, W, C] float -> (flat, across, row_steps, column_steps, sums).

    flat [rows, C'] int8 sums over columns, across [C, rows'] int8 over rows: the flat padded layout of
    w8a8/window.py, zeros where padding is; row_steps [B] and column_steps [C] float32 are what such a sum is worth;
    sums int32 [C]: of across over its rows, where there is a seed. seed: int64 [] for stochastic rounding; None: to
    the nearest.
    """
    window = same_window(len(x), *x.shape[1:3], padding=tuple(padding))
    if x.is_cuda:
        return rounding.encode_images(x, bits, groups, window.padding, seed)
    return images_in_torch(x, bits, groups, window, seed)


@shift_images.register_fake
def _(x, bits, groups, padding, seed):
    window, c = same_window(len(x), *x.shape[1:3], padding=tuple(padding)), x.shape[3]
    flat = x.new_empty(window.rows, _wide(c), dtype=torch.int8)
    across = x.new_empty(c, _long(window), dtype=torch.int8)
    floats = [x.new_empty(size, dtype=torch.float32) for size in (len(x), c)]
    return flat, across, *floats, x.new_empty(c, dtype=torch.int32)


@op
def shift_weight(weight: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [N, kh, kw, C] float -> (codes, turned, row_steps, column_steps).

    codes [N, taps C'] int8 sums over columns; turned [C, taps N'] int8, its taps in the opposite order, over outputs;
    row_steps [N] and column_steps [C] float32 are what such a sum is worth.
    """
    if weight.is_cuda:
        return rounding.encode_weight(weight, bits, groups)
    found = shift.encode(weight.reshape(len(weight), -1, weight.shape[3]), bits, groups)
    turned = shift.across_rows(found).view(weight.shape).flip(1, 2).permute(3, 1, 2, 0)
    codes = shift.across_columns(found).view(weight.shape)
    codes, turned = (F.pad(one, (0, _wide(one.shape[3]) - one.shape[3])).flatten(1) for one in (codes, turned))
    return codes, turned.contiguous(), *_steps(found)


@shift_weight.register_fake
def _(weight, bits, groups):
    n, kh, kw, c = weight.shape
    codes = weight.new_empty(n, kh * kw * _wide(c), dtype=torch.int8)
    turned = weight.new_empty(c, kh * kw * _wide(n), dtype=torch.int8)
    return codes, turned, *(weight.new_empty(size, dtype=torch.float32) for size in (n, c))


@op
def shift_flat_conv2d(
    flat: Tensor,
    weight: Tensor,
    x_steps: Tensor,
    weight_steps: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """flat [rows, C'] int8 of images B, H, W (size), weight [N, taps C'] int8, x_steps [B], weight_steps [N] float32
    -> [B, H', W', N] of dtype.

    Raises ValueError for operands that do not belong together, or whose sums may pass an int32.
    """
    window = _window(size, kernel, stride, padding, dilation)
    if flat.shape[0] != window.rows or weight.shape[1] != window.taps * flat.shape[1]:
        raise ValueError(f"codes {list(flat.shape)} and {list(weight.shape)} do not belong to {window}.")
    if weight.shape[1] > shift.TERMS:
        raise ValueError(f"sums of {weight.shape[1]} products of 8-bit codes may pass an int32.")
    if not flat.is_cuda:
        x = images(flat, window, flat.shape[1]).permute(0, 2, 3, 1)
        return _multiplied(
            x, weight.view(len(weight), *window.kernel, -1), x_steps, weight_steps, bias, window, dtype
        )
    out = flat.new_empty(window.batch, *window.output, len(weight), dtype=dtype)
    return steps.product.conv2d(flat, window, weight, x_steps, None, weight_steps, None, bias, None, None, out)


@shift_flat_conv2d.register_fake
def _(flat, weight, x_steps, weight_steps, bias, size, kernel, stride, padding, dilation, dtype):
    window = _window(size, kernel, stride, padding, dilation)
    return flat.new_empty(window.batch, *window.output, len(weight), dtype=dtype)


@op
def shift_over_rows(
    d: Tensor,
    x: Tensor,
    d_steps: Tensor,
    x_steps: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """d [N, rows'] int8, x [C, rows'] int8 of images B, H, W (size), steps float32 [N] and [C] -> [N, kh, kw, C]
    float32. The stride is 1; d has the padding dilation (kernel - 1) - padding.

    Raises ValueError for operands that do not belong together.
    """
    window = _window(size, kernel, POINT, padding, dilation)
    around = tuple(a * (k - 1) - p for k, p, a in zip(kernel, padding, dilation, strict=True))
    output = same_window(window.batch, *window.output, padding=around)
    if (d.shape[1], x.shape[1]) != (_long(output), _long(window)):
        raise ValueError(f"codes {list(d.shape)} and {list(x.shape)} do not belong to {window}.")
    if x.is_cuda:
        return over_rows.weight_gradient(d, x, d_steps, x_steps, window)
    gradient, pixels = (
        images(one.T[: of.rows].contiguous(), of, len(one)).permute(0, 2, 3, 1)
        for one, of in ((d, output), (x, window))
    )
    sums = torch.zeros(len(d), window.taps * len(x), dtype=torch.float64)
    sums += gradient.reshape(-1, len(d)).double().T @ _windows(pixels, window).double()
    return (sums.view(len(d), *window.kernel, -1) * x_steps * d_steps[:, None, None, None]).float()


@shift_over_rows.register_fake
def _(d, x, d_steps, x_steps, size, kernel, padding, dilation):
    return x.new_empty(len(d), *kernel, len(x), dtype=torch.float32)


def images_in_torch(x: Tensor, bits: int, groups: int, window: Window, seed: Tensor | None) -> tuple:
    """What shift_images returns, as a formula."""
    c, noise = x.shape[3], None
    if seed is not None:
        noise = images(noise_of(seed, window.rows, c), window, c).permute(0, 2, 3, 1).reshape(len(x), -1, c)
    found = shift.encode(x.reshape(len(x), -1, c), bits, groups, noise)
    flat = torch.zeros(window.rows, _wide(c), dtype=torch.int8, device=x.device)
    images(flat, window, c).copy_(shift.across_columns(found).view(x.shape).permute(0, 3, 1, 2))
    across = torch.zeros(_long(window), c, dtype=torch.int8, device=x.device)
    images(across, window, c).copy_(shift.across_rows(found).view(x.shape).permute(0, 3, 1, 2))
    sums = across.sum(0, dtype=torch.int32)
    return flat, across.T.contiguous(), *_steps(found), sums if seed is not None else torch.zeros_like(sums)


def _steps(found: shift.ShiftCodes) -> tuple[Tensor, Tensor]:
    one = shift.shift_step(found.groups)
    return shift.row_steps(found) * one, shift.column_steps(found) * one


def _window(size, kernel, stride, padding, dilation) -> Window:
    return same_window(*size, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


def _wide(channels: int) -> int:
    return cdiv(channels, CHANNELS) * CHANNELS


def _long(window: Window) -> int:
    """The length of a row of `across`."""
    return cdiv(window.rows, ROWS) * ROWS
