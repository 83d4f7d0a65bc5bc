"""SVDQuant's layers through OpenVINO: smoothing, rounding and branch by the formula of kernels/w4/reference.py.

Their 4-bit weights have a scale for each group of inputs, so the products are of floats: of the values that the
codes stand for, unpacked in OpenVINO's product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inference.openvino.forms import Form, Grid, Product, Weight, register_form
from ..kernels.formats.int4 import unpack_int4

TINY = torch.finfo(torch.float32).tiny


def _form(layer: Any) -> Form:
    plan = layer.plan
    if plan.activation == "fp8":
        raise ValueError("has inputs in FP8, which OpenVINO has no products for")
    if plan.projects:
        raise ValueError("leaves the branch's directions out of its inputs, which OpenVINO has no products for")
    codes = unpack_int4(layer.qweight, plan.group_size)
    down, up = (None if one is None else one.detach().float() for one in layer.branch)
    smooth = None if layer.smooth is None else layer.smooth.detach().float()
    bias = None if layer.bias is None else layer.bias.detach().float()

    def rounded(x: Tensor, grid: Grid) -> Tensor:
        if plan.activation == "none":
            return x
        if plan.activation == "int8":
            return scaled(x, x.abs(), 127, 127, grid)
        groups = x.unflatten(-1, (-1, plan.group_size))
        if plan.shift:
            return scaled(groups, groups, 0, 15, grid).flatten(-2)
        return scaled(groups, groups.abs(), 7, 7, grid).flatten(-2)

    def rows(x: Tensor, grid: Grid, product: Product) -> Tensor:
        lifted = plan.turned(x + plan.shift if plan.shift else x)  # no plan has both
        inputs = lifted if smooth is None else lifted / smooth
        y = product(rounded(inputs, grid))
        if down is not None:
            y = y + F.linear(F.linear(x, down), up)
        return y if bias is None else y + bias

    def forward(x: Tensor, grid: Grid, product: Product) -> Tensor:
        if not isinstance(layer, nn.Conv2d):
            return rows(x, grid, product)
        return rows(x.permute(0, 2, 3, 1), grid, product).permute(0, 3, 1, 2)

    return Form(Weight(codes, layer.wscales.detach().float(), bits=4), forward, False)


def scaled(x: Tensor, size: Tensor, down: int, up: int, grid: Grid) -> Tensor:
    """x on whole steps from -down to up, the largest of `size` in the last axis at `up`."""
    scale = size.amax(-1, keepdim=True) / up
    scale = torch.where(scale < TINY, 1.0, scale)
    return grid(x / scale, -down, up, down + up + 1) * scale


register_form("svdq", _form)
