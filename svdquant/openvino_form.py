"""SVDQuant's layers through OpenVINO: smoothing, rounding and branch as kernels/w4/reference.py has them.

Their 4-bit weights have a scale for each group of inputs, so the products are of floats: of the values that the
codes stand for, unpacked in OpenVINO's product.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..inference.openvino.forms import Form, Grid, Product, Weight, register_form
from ..kernels.formats.int4 import unpack_int4
from ..kernels.w4 import reference


def _form(layer: Any) -> Form:
    plan = layer.plan
    if plan.activation == "fp8":
        raise ValueError("has inputs in FP8, which OpenVINO has no products for")
    codes = unpack_int4(layer.qweight, plan.group_size)
    down, up = (None if one is None else one.detach().float() for one in layer.branch)
    smooth = None if layer.smooth is None else layer.smooth.detach().float()
    bias = None if layer.bias is None else layer.bias.detach().float()

    def rows(x: Tensor, product: Product) -> Tensor:
        lifted = x + plan.shift if plan.shift else x
        inputs = lifted if smooth is None else lifted / smooth
        y = product(reference.round_activation(inputs, plan.activation, plan.group_size, bool(plan.shift)))
        if down is not None:
            y = y + F.linear(F.linear(x, down), up)
        return y if bias is None else y + bias

    def forward(x: Tensor, grid: Grid, product: Product) -> Tensor:
        if not isinstance(layer, nn.Conv2d):
            return rows(x, product)
        return rows(x.permute(0, 2, 3, 1), product).permute(0, 3, 1, 2)

    return Form(Weight(codes, layer.wscales.detach().float(), bits=4), forward, False)


register_form("svdq", _form)
