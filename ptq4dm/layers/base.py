"""Quantized layers: codes, scales and bias, nothing else.

They subclass nn.Linear and nn.Conv2d so that tools that look for those types (LoRA adapters, offloading) find
them; `weight` answers with the codes, and no float copy of the weight exists. A format is a pair of classes that add
`_allocate`, `pack`, `forward`, `dequantized_weight` and `kernel_name` to those here, and a line of registry.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class QuantizedLayer:
    """What all quantized layers share; a format's classes inherit from this first, then from nn.Linear or nn.Conv2d.

    They have `qweight`, the codes; `dequantized_weight()`, float32 and made anew in each call; and `kernel_name()`,
    the kernel that serves the layer where its codes are now. All tensors are nn.Parameters without gradient, so that
    device maps with offloading move them. `bias` is registered first: a model's `dtype` is that of its first floating
    parameter.

    plan: the choices that the layer was made by, of the class that its format registered.
    kept: names of the floating tensors that keep their dtype whatever the model is converted to.
    """

    plan: Any
    kept: tuple[str, ...] = ()
    qweight: Tensor
    bias: nn.Parameter | None
    training: bool

    def __new__(cls, layer: Any = None, *sizes: Any, **options: Any) -> Any:
        """peft makes a convolution's adapters as `type(layer)(inputs, outputs, ...)`: those are float layers."""
        return nn.Conv2d(layer, *sizes, **options) if isinstance(layer, int) else super().__new__(cls)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What `.to()` and `.half()` go through: kept tensors move but stay what they are, and nothing becomes an
        8-bit float (diffusers' layerwise casting would store scales so)."""
        kept = [getattr(self, name) for name in self.kept]

        def careful(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            keep = any(tensor is one for one in kept) or new.dtype.itemsize == 1
            return tensor.to(new.device) if keep and new.dtype != tensor.dtype else new

        return super()._apply(careful, recurse)  # type: ignore[misc]  # nn.Module's, which comes after this class

    @property
    def weight(self) -> Tensor:
        """The codes: float weights are not kept."""
        return self.qweight

    def dequantized_weight(self) -> Tensor:
        """The float32 weight that the codes stand for, made anew in each call."""
        raise NotImplementedError

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        raise NotImplementedError

    def _float_layer(self) -> nn.Module:
        """A float layer of the same shape, without tensors."""
        raise NotImplementedError

    def kernels(self) -> dict[str, str]:
        """The kernels that serve this layer, by the rows of its input: {"all rows": name}, or one name for few rows
        and one for more."""
        return {"all rows": self.kernel_name()}

    def kernels_text(self) -> str:
        """The kernels in a few words, for reports."""
        return ", ".join(name if rows == "all rows" else f"{name} ({rows})" for rows, name in self.kernels().items())

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """A float layer with the dequantized weight, in the bias's dtype or, without one, in `dtype`."""
        layer = self._float_layer()
        dtype = dtype if self.bias is None else self.bias.dtype
        layer.weight = nn.Parameter(self.dequantized_weight().to(dtype))
        layer.bias = self.bias
        return layer.train(self.training)

    def put(self, **values: Tensor) -> None:
        """Set tensors of the layer to these values, as parameters without gradient."""
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.detach(), requires_grad=False))


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """x [..., K] float -> [..., N] in x's dtype."""

    def __init__(self, linear: nn.Linear, plan: Any, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.plan = plan
        self.bias = bias_like(linear, self.out_features, device)
        self._allocate((self.out_features, self.in_features), device)

    def _float_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.plan}"


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """Zero-padded convolution: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def __init__(self, conv: nn.Conv2d, plan: Any, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding, self.padding_mode = numeric_padding(conv), "zeros"
        self.plan = plan
        self.bias = bias_like(conv, self.out_channels, device)
        self._allocate((self.out_channels, self.in_channels // self.groups, *self.kernel_size), device)

    def _float_layer(self) -> nn.Conv2d:
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return nn.Conv2d(self.in_channels, self.out_channels, *geometry, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, {self.plan}"


def frozen(*size: int, dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """An empty parameter without gradient."""
    return nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)


def bias_like(layer: nn.Module, outputs: int, device: torch.device | str | None) -> nn.Parameter | None:
    """Room for the bias of a layer, if it has one."""
    return None if layer.bias is None else frozen(outputs, dtype=layer.bias.dtype, device=device)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer of any format."""
    return isinstance(module, QuantizedLayer)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place that the dotted name says."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if child.isdigit() and isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(child)] = new
    else:
        setattr(owner, child, new)


def numeric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding of a convolution on each side, in pixels."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return tuple(conv.padding)
