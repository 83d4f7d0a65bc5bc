"""Tensors in codes as the products on a GPU read them, and these products: the ops of training on integers there.

    shift_images          floats to codes, once for both products that a tensor is in (rounding.py)
    shift_weight          the same of a weight
    shift_flat_conv2d     y[b, o, n] = f[b] v[n] sum_{tap, c} x w + bias: the implicit GEMM of w8a8/product.py
    shift_over_rows       g[n, tap, c] = u[n] t[c] sum_{b, o} d x (turned.py, over_rows.py)

On a CPU they are formulas in torch: the truth for the kernels, and not how a CPU trains (products.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import shift
from ..runtime.late import late
from ..runtime.ops import op
from ..w8a8 import steps
from ..w8a8.reference import images
from ..w8a8.window import Window, gradient_window, same_window, stored_channels
from .noise import noise_of
from .products import _multiplied, _windows

if TYPE_CHECKING:
    from . import over_rows, rounding, turned
else:
    late(globals(), "over_rows", "rounding", "turned")

POINT = (1, 1)


@op
def shift_images(
    x: Tensor, bits: int, groups: int, padding: Sequence[int], seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, H, W, C] float -> (flat, h, g, row_steps, column_steps, sums).

    flat [rows, C'] int8: codes that sum over columns, in the flat padded layout of w8a8/window.py, zeros where
    padding is; h [B] and g [C] int8: shifts of rows and columns; row_steps [B] and column_steps [C] float32: what a
    sum over columns, or over rows, is worth; sums [C] int32: of codes with the rows' shifts over all rows, if there
    is a seed. seed: int64 [] for stochastic rounding; None: to the nearest.
    """
    if x.is_cuda:
        return tuple(rounding.encode_images(x, bits, groups, tuple(padding), seed))
    return images_in_torch(x, bits, groups, tuple(padding), seed)


@shift_images.register_fake
def _(x, bits, groups, padding, seed):
    window, c = same_window(len(x), *x.shape[1:3], padding=tuple(padding)), x.shape[3]
    flat = x.new_empty(window.rows, stored_channels(c), dtype=torch.int8)
    shifts, floats = ([x.new_empty(n, dtype=d) for n in (len(x), c)] for d in (torch.int8, torch.float32))
    return flat, *shifts, *floats, x.new_empty(c, dtype=torch.int32)


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
    codes, turned = (_filled_up(one).flatten(1) for one in (codes, turned))
    return codes, turned.contiguous(), *_steps(found)


@shift_weight.register_fake
def _(weight, bits, groups):
    n, kh, kw, c = weight.shape
    codes = weight.new_empty(n, kh * kw * stored_channels(c), dtype=torch.int8)
    turned = weight.new_empty(c, kh * kw * stored_channels(n), dtype=torch.int8)
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
        weight = weight.view(len(weight), *window.kernel, -1)
        return _multiplied(x, weight, x_steps, weight_steps, bias, window, dtype)
    out = flat.new_empty(window.batch, *window.output, len(weight), dtype=dtype)
    return steps.product.conv2d(flat, window, weight, x_steps, None, weight_steps, None, bias, None, None, out)


@shift_flat_conv2d.register_fake
def _(flat, weight, x_steps, weight_steps, bias, size, kernel, stride, padding, dilation, dtype):
    window = _window(size, kernel, stride, padding, dilation)
    return flat.new_empty(window.batch, *window.output, len(weight), dtype=dtype)


@op
def shift_over_rows(
    d: Tensor,
    d_h: Tensor,
    d_g: Tensor,
    d_steps: Tensor,
    d_groups: int,
    x: Tensor,
    x_h: Tensor,
    x_g: Tensor,
    x_steps: Tensor,
    x_groups: int,
    size: Sequence[int],
    kernel: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Flat codes of a gradient and of images B, H, W (size), each with its shifts, column_steps and groups
    -> [N, kh, kw, C] float32. The stride is 1; d has the padding dilation (kernel - 1) - padding.

    Raises ValueError for operands that do not belong together.
    """
    window = _window(size, kernel, POINT, padding, dilation)
    output = gradient_window(window)
    if (len(d), len(x)) != (output.rows, window.rows):
        raise ValueError(f"codes {list(d.shape)} and {list(x.shape)} do not belong to {window}.")
    if x.is_cuda:
        gradient = turned.turn_gradient(d, d_h, d_g, d_groups, window)
        pixels = turned.turn_pixels(x, x_h, x_g, x_groups, window)
        return over_rows.weight_gradient(gradient, pixels, d_steps, x_steps, window)
    gradient, pixels = (
        _with_rows_shifts(d, d_h, d_g, d_groups, output),
        _with_rows_shifts(x, x_h, x_g, x_groups, window),
    )
    sums = gradient.reshape(-1, len(d_g)).double().T @ _windows(pixels, window).double()
    return (sums.view(len(d_g), *window.kernel, -1) * x_steps * d_steps[:, None, None, None]).float()


@shift_over_rows.register_fake
def _(d, d_h, d_g, d_steps, d_groups, x, x_h, x_g, x_steps, x_groups, size, kernel, padding, dilation):
    return x.new_empty(len(d_g), *kernel, len(x_g), dtype=torch.float32)


def images_in_torch(x: Tensor, bits: int, groups: int, padding: tuple[int, int], seed: Tensor | None) -> tuple:
    """What shift_images returns, as a formula."""
    window, c = same_window(len(x), *x.shape[1:3], padding=padding), x.shape[3]
    rows = x.reshape(len(x), -1, c)
    noise = None if seed is None else noise_of(seed, x.numel()).view(rows.shape)
    found = shift.encode(rows, bits, groups, noise)
    flat = torch.zeros(window.rows, stored_channels(c), dtype=torch.int8, device=x.device)
    images(flat, window, c).copy_(shift.across_columns(found).view(x.shape).permute(0, 3, 1, 2))
    sums = shift.across_rows(found).sum((0, 1), dtype=torch.int32)
    return flat, found.rows, found.columns, *_steps(found), sums if seed is not None else torch.zeros_like(sums)


def _with_rows_shifts(flat: Tensor, h: Tensor, g: Tensor, groups: int, window: Window) -> Tensor:
    """int8 [B, H, W, C]: codes of the flat layout, shifted as their rows want it, and not their columns."""
    codes = images(flat, window, len(g)).permute(0, 2, 3, 1) >> (groups - 1 - g)
    return codes << (groups - 1 - h)[:, None, None, None]


def _filled_up(codes: Tensor) -> Tensor:
    """[N, kh, kw, C] -> [N, kh, kw, C'], with zeros."""
    return F.pad(codes, (0, stored_channels(codes.shape[3]) - codes.shape[3]))


def _steps(found: shift.ShiftCodes) -> tuple[Tensor, Tensor]:
    one = shift.shift_step(found.groups)
    return shift.row_steps(found) * one, shift.column_steps(found) * one


def _window(size, kernel, stride, padding, dilation) -> Window:
    return same_window(*size, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
