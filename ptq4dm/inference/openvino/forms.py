"""What a quantized layer computes, written so that OpenVINO can serve it: its form.

A form is a function of torch around two operations that OpenVINO knows by a pattern (tracing.py): `grid`, which puts
values on a fixed grid, and `product`, the layer's product with its stored codes. Of the two together OpenVINO makes
one product of 8-bit integers, if the codes have one scale an output. So inputs with scales found in each call are
divided by them before a grid of whole steps, and the product is multiplied by them: the integers are the same.

    static    y = (grid(x; s, z) W^T) + b
    dynamic   y = t (grid(x / t; 1, 0) W^T) + b,    t = max|x| / (2^(b-1) - 1) per token, or per sample

A format adds itself with `register_form`; whoever cannot be served is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.formats.hadamard import turned
from ...kernels.formats.int8 import dynamic_scale
from ...kernels.w4.progressive import progressive_codes
from ...layers.int4 import channel_first
from ...layers.plan import FLOAT_INPUTS
from ...registry import Registry

FORMS: Registry = Registry("format that OpenVINO serves", late=True)

Grid = Callable[[Tensor, float, float, int], Tensor]
"""grid(x, low, high, levels) -> x on evenly spaced values from low to high, the nearest of them."""

Product = Callable[[Tensor], Tensor]
"""product(x) -> x W^T, or the convolution of x, without bias."""


@dataclass
class Weight:
    """A layer's codes: w[n, k] = scales[n, g] (codes[n, k] - zeros[n, g]), g = k // (K / G).

    codes   [N, K] or [N, C, kh, kw] int8
    scales  [N, G] float32; G > 1 in Linear layers only
    zeros   [N, G] int8, or None
    bits    4 or 8, in which the codes are stored
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    bits: int = 8

    def largest(self) -> int:
        """The largest |code - zero|."""
        codes = self.codes.flatten(1).unflatten(1, (self.scales.shape[1], -1)).short()
        if self.zeros is not None:
            codes = codes - self.zeros.short().unsqueeze(-1)
        return int(codes.abs().max())

    def dequantized(self) -> Tensor:
        """float32, of the codes' shape."""
        codes = self.codes.float().flatten(1).unflatten(1, (self.scales.shape[1], -1))
        if self.zeros is not None:
            codes = codes - self.zeros.float().unsqueeze(-1)
        return (codes * self.scales.unsqueeze(-1)).view(self.codes.shape)


@dataclass
class Form:
    """weight: the codes. forward: (x, grid, product) -> y, float32. integer: whether the product is of integers."""

    weight: Weight
    forward: Callable[[Tensor, Grid, Product], Tensor]
    integer: bool


def register_form(name: str, form: Callable[[nn.Module], Form]) -> None:
    """Say how layers of a format are served; `form` raises ValueError, the end of a sentence, for one that is not."""
    FORMS.add(name, form)


def form_of(layer: nn.Module) -> Form:
    """A layer's form. Raises ValueError, whose message ends a sentence about the layer, where it has none."""
    name = layer.plan.format
    if name not in FORMS:
        raise ValueError(f"is of format '{name}', which OpenVINO has no products for")
    with torch.no_grad():
        return FORMS.find(name)(layer)


def rounding_form(layer: Any, weight: Weight, rotation: int = 0) -> Form:
    """The form of layers whose inputs have one grid, as LayerPlan says, or none."""
    plan, bias = layer.plan, layer.added
    bits, conv = plan.activation_bits, isinstance(layer, nn.Conv2d)
    half = 2 ** (bits - 1)
    added = 0.0 if bias is None else bias.detach().float().view(-1, 1, 1) if conv else bias.detach().float()

    def turn(x: Tensor) -> Tensor:
        if not rotation:
            return x
        return turned(x.movedim(1, -1), rotation).movedim(-1, 1) if conv else turned(x, rotation)

    def as_they_are(x: Tensor, grid: Grid, product: Product) -> Tensor:
        return product(turn(x)) + added

    def static(x: Tensor, grid: Grid, product: Product) -> Tensor:
        return product(grid(turn(x), *ends(scale, zero, bits))) + added

    def dynamic(x: Tensor, grid: Grid, product: Product) -> Tensor:
        x = turn(x)
        scale = dynamic_scale(x, (1, 2, 3) if conv else (-1,), bits)
        return product(grid(x / scale, -half, half - 1, 2 * half)) * scale + added

    if bits == FLOAT_INPUTS:
        return Form(weight, as_they_are, False)
    integer = weight.scales.shape[1] == 1
    if not plan.static:
        return Form(weight, dynamic, integer)
    scale, zero = layer.input_scale.item(), layer.input_zero_point.item()
    return Form(weight, static, integer)


def ends(scale: float, zero: int, bits: int) -> tuple[float, float, int]:
    """(lowest value, highest value, number of values) of the affine grid of so many bits."""
    half = 2 ** (bits - 1)
    return scale * (-half - zero), scale * (half - 1 - zero), 2 * half


def _int8(layer: nn.Module) -> Form:
    return rounding_form(layer, Weight(layer.qweight.detach(), layer.weight_scale.detach().float()[:, None]))


def _int4(layer: nn.Module) -> Form:
    scales, zeros = layer.wscales.detach().float(), layer.wzeros
    if isinstance(layer, nn.Conv2d) and scales.shape[1] > 1:
        raise ValueError("is a convolution with several scales an output, which OpenVINO has no products for")
    # OpenVINO multiplies 8-bit inputs by 8-bit codes alone; where inputs are floats it unpacks 4 bits in the product.
    integer = scales.shape[1] == 1 and layer.plan.activation_bits != FLOAT_INPUTS
    codes = layer.codes().contiguous()
    weight = Weight(codes, scales, None if zeros is None else zeros.detach(), 8 if integer else 4)
    return rounding_form(layer, weight)


def _progressive(layer: nn.Module) -> Form:
    inputs = math.prod(layer.weight_shape[1:])
    codes = progressive_codes(layer.qweight, layer.wsteps, layer.wzeros, inputs).to(torch.int8)
    weight = Weight(channel_first(codes, layer.weight_shape).contiguous(), layer.wscales.detach().float()[:, None])
    return rounding_form(layer, weight, layer.plan.rotation or 0)


register_form("int8", _int8)
register_form("int4", _int4)
register_form("progressive", _progressive)
