"""One Linear whose inputs fall into ranges that were quantized apart:

    y = sum_i SVDQ_i(x[..., range i]) + b

So Nunchaku cuts the `proj_out` of FLUX's single blocks: its inputs are [attention, GELU], the former rounded as
signed and the latter as unsigned, each with smoothing and a low-rank branch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...checks import check_types
from ...errors import UserError
from ...kernels.w4 import layer as svdq_linear
from ...kernels.w4 import reference
from ...layers.base import QuantizedLayer
from ...layers.registry import register_format
from .plan import SVDQPlan
from .svdq import HALVES, SVDQLinear, check_divisors

TENSORS = ("qweight", "wscales", "smooth", "down", "up")


@dataclass
class SplitPlan:
    """inputs: the widths of the ranges, in order; parts: how each of them is quantized."""

    format: str = "svdq-split"
    inputs: list[int] = field(default_factory=list)
    parts: list[SVDQPlan] = field(default_factory=list)

    simulated = False

    def __post_init__(self):
        self.parts = [SVDQPlan(**part) if isinstance(part, dict) else part for part in self.parts]

    def check(self) -> None:
        """Raises ValueError where the parts are not those of the ranges, or one of them is out of range."""
        if not self.parts or len(self.inputs) != len(self.parts) or min(self.inputs) < 1:
            raise ValueError(f"{len(self.inputs)} ranges of inputs do not go with {len(self.parts)} parts")
        for part in self.parts:
            check_types(part)
            part.check()
            if part.format != "svdq" or part.lender or part.adapters:
                raise ValueError("a part has neither a lender nor adapters")

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where the ranges are not those of a float layer's inputs, or have other groups."""
        if sum(self.inputs) != layer.weight.shape[1]:
            raise ValueError(f"its ranges have {sum(self.inputs)} inputs and the layer {layer.weight.shape[1]}")
        for part, inputs in zip(self.parts, self.inputs, strict=True):
            if inputs % part.group_size:
                raise ValueError(f"{inputs} inputs do not divide into groups of {part.group_size}")

    def __str__(self) -> str:
        return " | ".join(str(part) for part in self.parts)


class SplitLinear(QuantizedLayer, nn.Linear):
    """x [..., K] float -> [..., N] in x's dtype, in which the parts are added.

    The tensors are those of SVDQLinear, one set for each part with its number behind the name: qweight_0, wscales_0,
    ..., qweight_1, ...; there is one bias [N], which takes back the shifts of all parts.
    """

    plan: SplitPlan

    def __init__(self, linear: nn.Linear, plan: SplitPlan, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.plan = linear.in_features, linear.out_features, plan
        self._allocate_bias(linear, True, device)
        self._bias_is_added = linear.bias is None
        for i in range(len(plan.parts)):
            self._adopt(i, SVDQLinear(self._float_part(i), plan.parts[i], device))

    @classmethod
    def join(cls, linear: nn.Linear, parts: list[SVDQLinear]) -> SplitLinear:
        """The layer that `parts`, with their values, make up in the place of `linear`; their biases are added."""
        layer = cls(linear, SplitPlan(inputs=[p.in_features for p in parts], parts=[p.plan for p in parts]), "meta")
        for i, part in enumerate(parts):
            layer._adopt(i, part)
        bias = torch.stack([part.bias.float() for part in parts if part.bias is not None]).sum(0)
        layer.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
        return layer.train(linear.training)

    def _float_part(self, i: int) -> nn.Linear:
        return nn.Linear(self.plan.inputs[i], self.out_features, device="meta", dtype=self.bias.dtype)

    def _adopt(self, i: int, part: SVDQLinear) -> None:
        for name in TENSORS:
            setattr(self, f"{name}_{i}", getattr(part, name))

    @property
    def kept(self) -> tuple[str, ...]:
        names = [f"{name}_{i}" for i in range(len(self.plan.parts)) for name in TENSORS[1:]]
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def qweight(self) -> Tensor:  # type: ignore[override]
        """The codes of the first part."""
        return self.qweight_0

    @property
    def scales(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"wscales_{i}" for i in range(len(self.plan.parts)))

    def stored_dtypes(self, name: str) -> tuple[torch.dtype, ...]:
        return HALVES if name in self.kept else super().stored_dtypes(name)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        for i in range(len(self.plan.parts)):
            check_divisors(tensors, f"smooth_{i}")

    def part(self, i: int) -> SVDQLinear:
        """Part i as a layer of its own, on the same tensors; the first has the bias, the others zeros."""
        part = SVDQLinear(self._float_part(i), self.plan.parts[i], "meta")
        for name in TENSORS:
            setattr(part, name, getattr(self, f"{name}_{i}"))
        part.bias = nn.Parameter(torch.zeros_like(self.bias) if i else self.bias, requires_grad=False)
        return part

    def forward(self, input: Tensor) -> Tensor:
        y, bias = 0, self.bias
        for i, (piece, choice) in enumerate(zip(input.split(self.plan.inputs, -1), self.plan.parts, strict=True)):
            tensors = (getattr(self, f"{name}_{i}") for name in TENSORS)
            served = self._kernel_name(i) != svdq_linear.REFERENCE
            linear = svdq_linear.svdq_linear if served else reference.svdq_linear
            y, bias = y + linear(piece.contiguous(), *tensors, bias, choice.activation, choice.shift), None
        return y

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, K] that the parts stand for, side by side."""
        return torch.cat([self.part(i).dequantized_weight() for i in range(len(self.plan.parts))], 1)

    def dequantized(self) -> nn.Module:
        layer = super().dequantized()
        if self._bias_is_added:
            layer.bias = None
            return layer
        biases = [self.part(i).dequantized().bias.float() for i in range(len(self.plan.parts))]
        layer.bias = nn.Parameter(torch.stack(biases).sum(0).to(self.bias.dtype))
        return layer

    def pack(self, weight: Tensor, name: str, evidence=None) -> None:
        raise UserError(f"layer '{name}' of the plan was read from a checkpoint: its codes cannot be made anew.")

    def kernel_name(self) -> str:
        """Names of the kernels of its parts: one where they have the same."""
        return " + ".join(dict.fromkeys(self._kernel_name(i) for i in range(len(self.plan.parts))))

    def _kernel_name(self, i: int) -> str:
        choice = self.plan.parts[i]
        return svdq_linear.known_name(self.qweight.device, choice.activation, choice.group_size)

    def _float_layer(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.plan}"


register_format("svdq-split", plan=SplitPlan, layers={nn.Linear: SplitLinear})
