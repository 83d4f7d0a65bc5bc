"""Quantized layers: codes, scales and bias, nothing else.

They subclass nn.Linear and nn.Conv2d so that tools that look for those types (LoRA adapters, offloading) find
them; `weight` answers with the codes, and no float copy of the weight exists. A further format is one more pair
of classes in FORMATS, and a class of choices in plan.PLANS.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels.formats import fp8
from ..kernels.formats.int8 import dequantize_weight, quantize_weight
from ..kernels.w8a8 import from_codes as w8a8_codes
from ..kernels.w8a8 import layer as w8a8
from ..ranges.clipping import weight_scale
from .plan import LayerPlan


class QuantizedLayer:
    """What all quantized layers share; a format's classes inherit from this first, then from nn.Linear or nn.Conv2d.

    They have `qweight`, the codes; `dequantized_weight()`, float32 and made anew in each call; and `kernel_name()`,
    the kernel that serves the layer where its codes are now. All tensors are nn.Parameters without gradient, so that
    device maps with offloading move them. `bias` is registered first: a model's `dtype` is that of its first floating
    parameter.

    kept: names of the floating tensors that keep their dtype whatever the model is converted to.
    """

    plan: object
    kept: tuple[str, ...] = ()

    def __new__(cls, layer=None, *sizes, **options):
        """peft makes a convolution's adapters as `type(layer)(inputs, outputs, ...)`: those are float layers."""
        return nn.Conv2d(layer, *sizes, **options) if isinstance(layer, int) else super().__new__(cls)

    def _apply(self, fn, recurse=True):
        """What `.to()` and `.half()` go through: kept tensors move but stay what they are, and nothing becomes an
        8-bit float (diffusers' layerwise casting would store scales so)."""
        kept = [getattr(self, name) for name in self.kept]

        def careful(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            keep = any(tensor is one for one in kept) or new.dtype.itemsize == 1
            return tensor.to(new.device) if keep and new.dtype != tensor.dtype else new

        return super()._apply(careful, recurse)

    @property
    def weight(self) -> Tensor:
        """The codes: float weights are not kept."""
        return self.qweight

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """A float layer with the dequantized weight, in the bias's dtype or, without one, in `dtype`."""
        layer = self._float_layer()
        dtype = dtype if self.bias is None else self.bias.dtype
        layer.weight = nn.Parameter(self.dequantized_weight().to(dtype))
        layer.bias = self.bias
        return layer.train(self.training)


def frozen(*size: int, dtype: torch.dtype, device) -> nn.Parameter:
    """An empty parameter without gradient."""
    return nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)


class _W8A8Layer(QuantizedLayer):
    """What layers with 8-bit weights and activations share.

    bias              [N] in the model's dtype, or None
    qweight           [N, ...] int8 or e4m3, symmetric per output channel
    weight_scale      [N] float32
    input_scale       [] float32    static layers only
    input_zero_point  [] int32      static int8 layers only
    """

    plan: LayerPlan
    kept = ("weight_scale", "input_scale")
    code = torch.int8

    def _allocate(self, shape: tuple[int, ...], plan: LayerPlan, bias_dtype: torch.dtype | None, device):
        self.plan = plan
        self.bias = None if bias_dtype is None else frozen(shape[0], dtype=bias_dtype, device=device)
        self.qweight = frozen(*shape, dtype=self.code, device=device)
        self.weight_scale = frozen(shape[0], dtype=torch.float32, device=device)
        self.input_scale = frozen(dtype=torch.float32, device=device) if plan.static else None
        affine = plan.static and self.code == torch.int8
        self.input_zero_point = frozen(dtype=torch.int32, device=device) if affine else None

    @torch.no_grad()
    def pack(self, weight: Tensor, name: str) -> None:
        """Fill codes and scales from a float weight [N, ...], and the input grid from the plan.

        Raises UserError, naming the layer, if the weight holds NaN or infinity.
        """
        weight = weight.to(torch.float32)
        if not weight.isfinite().all():
            raise UserError(f"the weight of layer '{name}' holds NaN or infinity; quantize a model that is whole.")
        codes, scale = self._rounded(weight)
        values = {"qweight": codes, "weight_scale": scale}
        if self.plan.static:
            values["input_scale"] = torch.tensor(self.plan.input_scale, dtype=torch.float32)
        if self.input_zero_point is not None:
            values["input_zero_point"] = torch.tensor(self.plan.input_zero_point, dtype=torch.int32)
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.to(weight.device), requires_grad=False))

    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [N, ...] and scales [N] of a float32 weight, by the plan."""
        plan = self.plan
        scale = weight_scale(weight, plan.weight_bits, plan.objective, plan.objective_parameter)
        return quantize_weight(weight, scale, plan.weight_bits), scale

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        return dequantize_weight(self.qweight, self.weight_scale)

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now."""
        groups = getattr(self, "groups", 1)
        return w8a8.kernel_name(self.qweight.device, self.plan.activation_bits, groups, self.code)

    def _operands(self):
        return (
            self.qweight, self.weight_scale, self.bias, self.input_scale, self.input_zero_point,
            self.plan.activation_bits,
        )  # fmt: skip


class Int8Linear(_W8A8Layer, nn.Linear):
    """y = x W^T + b on int8 codes: x [..., K] float -> [..., N] in x's dtype."""

    def __init__(self, linear: nn.Linear, plan: LayerPlan, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.dtype
        self._allocate((self.out_features, self.in_features), plan, bias, device)

    def forward(self, x: Tensor) -> Tensor:
        return w8a8_codes.linear(x, *self._operands())

    def _float_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.plan}"


class Int8Conv2d(_W8A8Layer, nn.Conv2d):
    """Zero-padded convolution on int8 codes: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def __init__(self, conv: nn.Conv2d, plan: LayerPlan, device=None):
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.padding, self.padding_mode = _numeric_padding(conv), "zeros"
        bias = None if conv.bias is None else conv.bias.dtype
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        self._allocate(shape, plan, bias, device)

    def forward(self, x: Tensor) -> Tensor:
        return w8a8.w8a8_conv2d(x, *self._operands(), self.stride, self.padding, self.dilation, self.groups)

    def _float_layer(self) -> nn.Conv2d:
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        return nn.Conv2d(self.in_channels, self.out_channels, *geometry, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, {self.plan}"


class _Fp8Layer:
    """What makes a W8A8 layer one of e4m3 codes; torch counts them as floats, so they are kept from conversion."""

    kept = ("qweight", "weight_scale", "input_scale")
    code = fp8.DTYPE

    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = fp8.scale_of(weight, tuple(range(1, weight.ndim)))
        return fp8.quantize(weight, scale), scale.flatten()


class Fp8Linear(_Fp8Layer, Int8Linear):
    """y = x W^T + b on e4m3 codes: x [..., K] float -> [..., N] in x's dtype."""


class Fp8Conv2d(_Fp8Layer, Int8Conv2d):
    """Zero-padded convolution on e4m3 codes: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""


FORMATS: dict[str, dict[type, type]] = {
    "int8": {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d},
    "fp8": {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d},
}


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer)


def empty_quantized(module: nn.Module, plan, device=None) -> nn.Module:
    """A quantized layer of the module's shape, its tensors allocated but not filled."""
    kinds = FORMATS[plan.format]
    return kinds[type(module)](module, plan, device)


@torch.no_grad()
def quantized_copy(module: nn.Module, plan, name: str) -> nn.Module:
    """The quantized layer of a float layer: same device, the same bias. `name` is for error messages."""
    layer = empty_quantized(module, plan, module.weight.device)
    layer.pack(module.weight, name)
    if module.bias is not None:
        layer.bias.copy_(module.bias)
    return layer.train(module.training)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if child.isdigit() and isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(child)] = new
    else:
        setattr(owner, child, new)


def _numeric_padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return tuple(conv.padding)
