"""Layers of weights split by value, under inputs as they come: format "value-split", in two forms.

    codes      one tensor: the cluster of each weight and its code there; b + 1.6 bits a weight
    literal    as the paper has it, a tensor of codes for each cluster; 3 b bits a weight

kernels/formats/clusters.py has the formulas. Everywhere the reference computes: the weight is looked up in each call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...evidence import LayerEvidence
from ...kernels.formats.clusters import (
    MOST,
    code_values,
    literal_values,
    pack_bits,
    pack_thirds,
    unpack_bits,
    unpack_thirds,
)
from ...kernels.w8a8.layer import REFERENCE
from ...transforms.split_values import clusters
from ..base import QuantizedConv2d, QuantizedLayer, QuantizedLinear, frozen
from ..plan import FLOAT_INPUTS, LayerPlan
from ..registry import finite, register_format

FORMS = ("codes", "literal")
SCOPES = ("tensor", "output")


@dataclass
class ValueSplitPlan(LayerPlan):
    """How the weights of one layer are split by value and rounded.

    weight_bits: of a code, 2 to 8. activation_bits: 16, inputs are as they come.
    form: "codes" or "literal".
    scope: what is clustered, and has grids, by itself: the whole "tensor", or each "output".
    clusters: 1 to 3; one is an affine grid for all of a scope.
    """

    input_widths: ClassVar[Sequence[int]] = (FLOAT_INPUTS,)
    format: str = "value-split"
    weight_bits: int = 2
    activation_bits: int = FLOAT_INPUTS
    form: str = "codes"
    scope: str = "tensor"
    clusters: int = MOST

    def check(self) -> None:
        super().check()
        if self.form not in FORMS or self.scope not in SCOPES:
            raise ValueError(f"form is codes or literal and scope tensor or output, not {self.form} and {self.scope}")
        if not 1 <= self.clusters <= MOST:
            raise ValueError(f"clusters is from 1 to {MOST}, not {self.clusters}")
        if (self.objective, self.rounding) != ("max", "nearest"):
            raise ValueError("clusters reach to their ends and round to nearest: objective max, rounding nearest")

    def check_layer(self, layer: nn.Module) -> None:
        if len(layer.weight) < self.clusters:
            raise ValueError(f"a layer of {len(layer.weight)} outputs is not split in {self.clusters} clusters")

    @property
    def simulated(self) -> bool:
        """Always: no kernel multiplies the codes."""
        return True

    @property
    def groups_text(self) -> str:
        scope = {"output": "an output", "tensor": "a tensor"}[self.scope]
        return f" {self.clusters} clusters {scope}" + (", literal" if self.form == "literal" else "")


class ValueSplitLayer(QuantizedLayer):
    """What Linear and Conv2d share; N outputs of K inputs, C clusters, R = 1 or N scopes.

    bias      [N] in the model's dtype, or None
    qweight   [N, ceil(K b / 8)] uint8, codes of b bits; [C N, ...] in literal form, cluster by cluster
    places    [N, ceil(K / 5)] uint8, clusters of the weights; None in literal form, and of one cluster
    wscales   [R, C] float16, or float32 of one scope
    wlows     as wscales: what code 0 stands for; None in literal form
    wzeros    [R, C] uint8, the codes of zero; None in the form of codes
    """

    plan: ValueSplitPlan
    kept = ("wscales", "wlows")
    scales = ("wscales",)
    places: Tensor | None
    wscales: Tensor
    wlows: Tensor | None
    wzeros: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        plan, outputs, inputs = self.plan, shape[0], math.prod(shape[1:])
        literal, count = plan.form == "literal", plan.clusters
        rows, kind = (1, torch.float32) if plan.scope == "tensor" else (outputs, torch.float16)
        width = -(-inputs * plan.weight_bits // 8)
        self.qweight = frozen(outputs * (count if literal else 1), width, dtype=torch.uint8, device=device)
        self.places = None
        if not literal and count > 1:
            self.places = frozen(outputs, -(-inputs // 5), dtype=torch.uint8, device=device)
        self.wscales = frozen(rows, count, dtype=kind, device=device)
        self.wlows = None if literal else frozen(rows, count, dtype=kind, device=device)
        self.wzeros = frozen(rows, count, dtype=torch.uint8, device=device) if literal else None

    @torch.no_grad()
    def pack(self, weight: Tensor, name: str, evidence: LayerEvidence | None = None) -> None:
        """Fill codes, clusters and grids from a float weight [N, ...].

        Raises UserError, naming the layer, if the weight holds NaN or infinity.
        """
        plan, matrix = self.plan, finite(weight, name).flatten(1)
        ids = torch.zeros_like(matrix, dtype=torch.uint8)
        if plan.clusters > 1:
            ids = clusters(matrix, plan.scope == "output", plan.clusters)
        self.fill(matrix, ids)

    def fill(self, matrix: Tensor, ids: Tensor) -> None:
        """Set the layer's tensors from a weight [N, K] float32 and the cluster of each, uint8 [N, K]."""
        plan = self.plan
        low, high = _ends(matrix, ids, plan)
        if plan.form == "literal":
            self._fill_literal(matrix, ids, low.clamp(max=0), high.clamp(min=0))
        else:
            self._fill_codes(matrix, ids, low, high)

    def _fill_codes(self, matrix: Tensor, ids: Tensor, low: Tensor, high: Tensor) -> None:
        top, kind = 2**self.plan.weight_bits - 1, self.wscales.dtype
        low = low.to(kind)
        step = _steps((high - low.float()) / top, kind)
        where, rows = ids.long(), len(matrix)
        lows, steps = (one.float().expand(rows, -1).gather(1, where) for one in (low, step))
        codes = ((matrix - lows) / steps).round().clamp(0, top).to(torch.uint8)
        self.put(qweight=pack_bits(codes, self.plan.weight_bits), wscales=step, wlows=low)
        if self.places is not None:
            self.put(places=pack_thirds(ids))

    def _fill_literal(self, matrix: Tensor, ids: Tensor, low: Tensor, high: Tensor) -> None:
        bits = self.plan.weight_bits
        top = 2**bits - 1
        step = _steps((high - low) / top, self.wscales.dtype)
        zeros = (-low / step.float()).round().clamp(0, top)
        found = []
        for number in range(self.plan.clusters):
            own = torch.where(ids == number, matrix, 0.0)
            codes = (own / step[:, number : number + 1].float()).round() + zeros[:, number : number + 1]
            found.append(pack_bits(codes.clamp(0, top).to(torch.uint8), bits))
        self.put(qweight=torch.cat(found), wscales=step, wzeros=zeros.to(torch.uint8))

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        plan, shape = self.plan, self.weight_shape
        inputs = math.prod(shape[1:])
        codes = unpack_bits(self.qweight, plan.weight_bits, inputs)
        if self.wzeros is not None:
            return literal_values(codes.view(plan.clusters, shape[0], inputs), self.wzeros, self.wscales).view(shape)
        assert self.wlows is not None
        ids = torch.zeros_like(codes) if self.places is None else unpack_thirds(self.places, inputs)
        return code_values(codes, ids, self.wlows, self.wscales).view(shape)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        if "wzeros" in tensors and int(tensors["wzeros"].max()) >= 2**self.plan.weight_bits:
            raise ValueError(f"'wzeros' holds a code that {self.plan.weight_bits} bits have not")

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        if "places" in tensors:
            if int(tensors["places"].max()) >= MOST**5:
                raise ValueError("'places' holds a byte that is no five clusters")
            ids = unpack_thirds(tensors["places"], math.prod(self.weight_shape[1:]))
            if int(ids.max()) >= self.plan.clusters:
                raise ValueError(f"'places' names cluster {int(ids.max())}, and there are {self.plan.clusters}")

    def kernel_name(self) -> str:
        """The kernel that serves this layer: the reference, wherever its codes are."""
        return REFERENCE


class ValueSplitLinear(ValueSplitLayer, QuantizedLinear):
    """y = x W^T + b, W from the codebook: x [..., K] float -> [..., N] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.dequantized_weight().to(input.dtype), bias)


class ValueSplitConv2d(ValueSplitLayer, QuantizedConv2d):
    """Zero-padded convolution, W from the codebook: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight = self.dequantized_weight().to(input.dtype)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _ends(matrix: Tensor, ids: Tensor, plan: ValueSplitPlan) -> tuple[Tensor, Tensor]:
    """(least, largest) weight [R, C] of each cluster of each scope; 0 of one that nothing is in."""
    rows = (matrix, ids) if plan.scope == "output" else (matrix.reshape(1, -1), ids.reshape(1, -1))
    ends: tuple[list[Tensor], list[Tensor]] = [], []
    for number in range(plan.clusters):
        own = rows[1] == number
        some = own.any(1)
        for found, bound, least in zip(ends, (math.inf, -math.inf), (True, False), strict=True):
            values = torch.where(own, rows[0], bound)
            found.append(torch.where(some, values.amin(1) if least else values.amax(1), 0.0))
    return torch.stack(ends[0], 1), torch.stack(ends[1], 1)


def _steps(step: Tensor, kind: torch.dtype) -> Tensor:
    """Steps as they are stored; 1 of a cluster whose weights are all alike, and of one too narrow for the dtype."""
    stored = step.to(kind)
    return torch.where(stored >= torch.finfo(kind).tiny, stored, torch.ones_like(stored))


register_format("value-split", plan=ValueSplitPlan, layers={nn.Linear: ValueSplitLinear, nn.Conv2d: ValueSplitConv2d})
