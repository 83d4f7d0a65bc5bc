"""A layer while its block is trained: the float layer, computing what its quantized form would, with gradients.

    y = Q(x) W_q^T + b,    W_q = s (q - z),    Q(x) = s_x (clamp(round(x / s_x) + z_x) - z_x)

q is soft or rounded straight through (rounding/variables.py); s and b are trained where asked for, s as s_0 exp(u);
a static input grid [l, h] as [l exp(a), h exp(c)]. Dynamic input grids are those of the layer's kernel. Each part
of a split input (layers/split), and a first token that is apart, has the layer's grid, finer by its factor and moved
by its offset.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels.formats.int8 import affine_parameters, dynamic_scale, quantize_activation
from ..layers.plan import FLOAT_INPUTS
from ..layers.registry import FORMATS, empty_quantized, finite
from ..layers.rounded import RoundedLayer
from ..rounding.learned import Learning, near
from ..rounding.registry import ROUNDERS
from ..rounding.variables import VARIABLES, Variable, straight_through


def is_trainable(format: str) -> bool:
    """Whether layers of a number format can be trained, and gradients pass them: their codes are the weight's own."""
    found = FORMATS.find(format)
    rounded = all(issubclass(kind, RoundedLayer) for kind in found.layers.values())
    return rounded and found.grid in ROUNDERS.find("learned").grids


class SoftInput:
    """The input grid of a layer, with a gradient; `ends`: its trained ends, none where it stays what it is."""

    def __init__(self, plan: Any, module: nn.Module, trained: bool) -> None:
        self.plan, device = plan, module.weight.device
        self.dims = (-1,) if isinstance(module, nn.Linear) else (1, 2, 3)
        half = 2 ** (plan.activation_bits - 1)
        self.low, self.high = -half, half - 1
        self.ends: list[Tensor] = []
        self.factors, self.offsets = self._parts(module)
        if plan.static:
            zero = plan.input_zero_point
            self.reach = (self.low - zero) * plan.input_scale, (self.high - zero) * plan.input_scale
            if trained:  # of a grid around zero one number, which keeps it there
                self.ends = [torch.zeros((), device=device, requires_grad=True) for _ in range(1 if zero == 0 else 2)]

    def grid(self) -> tuple[Tensor | float, Tensor | float]:
        """(scale, zero point) of a static grid, with gradients where its ends are trained."""
        plan = self.plan
        if not self.ends:
            return plan.input_scale, plan.input_zero_point
        if len(self.ends) == 1:
            return plan.input_scale * self.ends[0].exp(), 0.0
        low, high = (reach * end.exp() for reach, end in zip(self.reach, self.ends, strict=True))
        scale = (high - low) / (self.high - self.low)
        return scale, straight_through(self.low - low / scale)

    def _parts(self, module: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        """Factors and offsets of the input's channels, as they lie in it; 1 and 0 of an input that is whole."""
        if not hasattr(self.plan, "channels"):
            return 1.0, 0.0
        shape = (-1,) if isinstance(module, nn.Linear) else (-1, 1, 1)
        factors, offsets = self.plan.channels(module.weight.shape[1])
        return factors.to(module.weight.device).view(shape), offsets.to(module.weight.device).view(shape)

    def __call__(self, x: Tensor) -> Tensor:
        """x rounded, in its dtype."""
        if self.plan.activation_bits == FLOAT_INPUTS:
            return x
        if not self.plan.static:
            scale = dynamic_scale(x.detach(), self.dims, self.plan.activation_bits)
            codes = quantize_activation(x.detach(), scale, torch.zeros_like(scale), self.plan.activation_bits)
            return x + ((codes * scale).to(x.dtype) - x.detach())
        scale, zero = self.grid()
        zero = zero + self.offsets
        factors = self.plan.token_factors(x) if hasattr(self.plan, "token_factors") else self.factors
        codes = (straight_through(x.float() * factors / scale) + zero).clamp(self.low, self.high)
        return ((codes - zero) * scale / factors).to(x.dtype)

    def found(self) -> tuple[float, int]:
        """The scale and zero point that training came to."""
        if len(self.ends) == 1:
            return float(torch.as_tensor(self.grid()[0])), 0
        low, high = (reach * float(end.exp()) for reach, end in zip(self.reach, self.ends, strict=True))
        return affine_parameters(low, high, self.plan.activation_bits)


class SoftLayer:
    """One layer of a block in training.

    module: the float layer; layer: the quantized one, allocated; `trained` names what is trained of it.
    """

    def __init__(self, module: nn.Module, layer: RoundedLayer, name: str, learning: Learning, evidence: Any) -> None:
        self.module, self.layer, self.name, self.plan = module, layer, name, layer.plan
        weight = finite(module.weight, name)
        self.matrix = layer.matrix(weight)
        self.begin, self.start = layer.rounded(weight, learning.begin, evidence)
        low, high = self.start.ends(self.matrix.shape[1])
        self.zeros = self.start.low - low
        train = learning.train
        self.codes: Variable | None = None
        if "rounding" in train:
            kind = VARIABLES.find(learning.variable)
            steps = near(self.start.steps(self.matrix), self.begin.float() - self.zeros)
            self.codes = kind(steps, low, high, learning.moves == "wide")
        self.nearest = self.start.codes(self.matrix)
        zeros = torch.zeros_like(self.start.scales, dtype=torch.float32)
        self.factors = zeros.requires_grad_() if "scales" in train else None
        self.shift = self.unit = None
        if "biases" in train and module.bias is not None:
            self.shift = torch.zeros(len(self.matrix), device=weight.device, requires_grad=True)
            self.unit = self.matrix.square().sum(1).sqrt()  # a shift of 1 is what an input of norm 1 can do
        self.input = SoftInput(layer.plan, module, "ranges" in train)

    def others(self) -> list[Tensor]:
        """What is trained beside the rounding."""
        return [*([] if self.factors is None else [self.factors]), *([] if self.shift is None else [self.shift])]

    def weight(self) -> Tensor:
        """The soft weight [N, ...], float32."""
        codes = self.nearest.float() if self.codes is None else self.codes.soft() + self.zeros
        return self.layer.shaped(self._grid().values(codes))

    def _grid(self) -> Any:
        if self.factors is None:
            return self.start
        return self.start.with_scales(self.start.scales.float() * self.factors.exp())

    def bias(self) -> Tensor | None:
        """The bias [N], float32."""
        bias = self.module.bias
        if bias is None or self.shift is None:
            return None if bias is None else bias.detach().float()
        return bias.detach().float() + self.shift * self.unit

    def forward(self, x: Tensor, drop: torch.Generator | None = None) -> Tensor:
        """y of x, in x's dtype. drop: draws which values of x stay exact, each with probability 1/2."""
        rounded = self.input(x)
        if drop is not None:
            exact = torch.rand(x.shape, generator=drop, device=x.device) < 0.5
            rounded = torch.where(exact, x, rounded)
        return _product(self.module, rounded, self.weight(), self.bias())

    def moved(self, codes: Tensor) -> float:
        """The share of codes that are not the nearest."""
        return float((codes != self.nearest).float().mean())

    @torch.no_grad()
    def untrained(self, codes: Tensor) -> RoundedLayer:
        """The quantized layer with these codes, under the grids that training begins with."""
        layer: Any = empty_quantized(self.module, self.plan, self.matrix.device)
        grid = {"input_scale": self.plan.input_scale, "input_zero_point": self.plan.input_zero_point}
        layer.plan = replace(self.layer.plan, **grid)
        layer.fill(codes, self.start)
        if self.module.bias is not None:
            layer.bias.copy_(self.module.bias)
        return layer

    @torch.no_grad()
    def packed(self) -> tuple[RoundedLayer, float]:
        """(the quantized layer that training came to, the share of its codes that are not the nearest)."""
        layer, plan = self.layer, self.layer.plan
        if self.input.ends:
            scale, zero = self.input.found()
            layer.plan = replace(plan, input_scale=scale, input_zero_point=zero)
        codes = self.nearest if self.codes is None else self.codes.hard() + self.zeros
        if not codes.isfinite().all():
            raise UserError(
                f"the training of layer '{self.name}' came to NaN or infinity; a smaller learning_rate is needed."
            )
        whole = codes.to(torch.int8)
        low, high = self.start.low, self.start.high
        if not (torch.equal(whole.float(), codes.float()) and bool(((whole >= low) & (whole <= high)).all())):
            raise AssertionError("a trained code is no whole number of its grid")
        grid = self._grid()
        layer.fill(whole, grid.with_scales(layer.stored_scales(grid.scales)))
        if (bias := self.bias()) is not None and layer.bias is not None:
            layer.bias.copy_(bias)
        return layer, self.moved(whole)


class FixedLayer:
    """A layer that is packed already: what it computes, with a gradient for its input where that has one."""

    def __init__(self, module: nn.Module, layer: nn.Module, name: str) -> None:
        if not (isinstance(layer, RoundedLayer) and is_trainable(layer.plan.format)):
            raise UserError(f"layer '{name}' is {layer.plan}: no gradient passes it, so its block cannot be trained.")
        self.module = module
        self.layer: Any = layer
        self.input = SoftInput(layer.plan, module, trained=False)

    def forward(self, x: Tensor, drop: torch.Generator | None = None) -> Tensor:
        """y of x, in x's dtype."""
        if not x.requires_grad:
            return self.layer(x)
        bias = None if self.module.bias is None else self.module.bias.detach()
        return _product(self.module, self.input(x), self.layer.dequantized_weight(), bias)


def _product(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a Linear or a Conv2d gives with another weight and bias, in the dtype of x."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)
