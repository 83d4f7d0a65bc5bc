"""Linear and Conv2d that train on integers: the parameters of the layers they take the place of, in float32."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...kernels.shift.products import kernel_name
from ...kernels.shift.transposed import takes
from ...kernels.w8a8.layer import TRITON
from .fused import FusedProduct
from .product import Product
from .served import ServedProduct
from .widths import Widths

Layer = TypeVar("Layer", bound=nn.Module)
POINT = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation of a Linear layer


class ShiftLinear(nn.Linear):
    """A Linear layer on integers; its parameters are those of `layer`, its call and its state dict, too."""

    def __init__(self, layer: nn.Linear, widths: Widths) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        _adopt(self, layer)
        self.widths = widths

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] float, the first dimension samples -> [..., N] of its dtype, or of autocast's."""
        rows = len(input) if input.ndim > 1 else 1
        if self.widths.served or self.widths.tokens:  # a row a token
            rows = input.numel() // self.in_features
        images = input.reshape(rows, 1, -1, self.in_features)
        y = _product(self.widths, input.device)(
            images, self.weight[:, None, None], self.bias, POINT, self.widths, output_dtype(input)
        )
        return y.view(*input.shape[:-1], self.out_features)

    def plain(self) -> nn.Linear:
        """The float layer with these parameters."""
        return _adopt(nn.Linear(self.in_features, self.out_features, bias=False, device="meta"), self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.widths}"


class ShiftConv2d(nn.Conv2d):
    """A Conv2d on integers; its parameters are those of `layer`, its call and its state dict, too."""

    def __init__(self, layer: nn.Conv2d, widths: Widths) -> None:
        super().__init__(*_shape(layer), bias=False, device="meta")
        _adopt(self, layer)
        self.widths = widths
        self.geometry = (self.stride, padding_of(layer), self.dilation)

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, H, W] float -> [B, N, H', W'] channels_last, of its dtype, or of autocast's."""
        images, weight = input.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)
        y = _product(self.widths, input.device)(
            images, weight, self.bias, self.geometry, self.widths, output_dtype(input)
        )
        return y.permute(0, 3, 1, 2)

    def plain(self) -> nn.Conv2d:
        """The float layer with these parameters."""
        return _adopt(nn.Conv2d(*_shape(self), bias=False, device="meta"), self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.widths}"


def trainable(layer: nn.Module) -> bool:
    """Whether a layer has a form on integers: Linear; Conv2d with zeros around and all channels in one group."""
    if type(layer) is nn.Linear:
        return True
    if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.padding_mode != "zeros":
        return False
    padding = padding_of(layer)
    return padding is not None and takes(layer.kernel_size, padding, layer.dilation)


def padding_of(layer: nn.Conv2d) -> Any:
    """The padding of a Conv2d as two numbers; None where the two sides have not the same."""
    if not isinstance(layer.padding, str):
        return layer.padding
    both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "valid":
        return (0, 0)
    return None if any(size % 2 for size in both) else tuple(size // 2 for size in both)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype a layer answers x in: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _product(widths: Widths, device: torch.device) -> Any:
    if widths.served:
        return ServedProduct.apply
    return (FusedProduct if kernel_name(device, (1, 1)) == TRITON else Product).apply


def _shape(layer: nn.Conv2d) -> Any:
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation


def _adopt(new: Layer, layer: nn.Module) -> Layer:
    """A layer, given the parameters of another, not copies of them."""
    for name in ("weight", "bias"):
        new.register_parameter(name, getattr(layer, name))
    return new.train(layer.training)
