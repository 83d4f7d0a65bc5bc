"""Layers with weights on the power grid (kernels/formats/power.py): format "power"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..evidence import LayerEvidence
from ..kernels import dispatch
from ..kernels.formats.int8 import weight_limit
from ..kernels.formats.power import PowerGrid, raised
from ..ranges.registry import OBJECTIVES
from ..ranges.weights import weight_grid
from . import power_ops
from .base import QuantizedConv2d, QuantizedLinear, frozen
from .int4_ops import PACKED
from .plan import LayerPlan
from .registry import register_format
from .rounded import RoundedLayer
from .stored import check_integers
from .w8a8 import allocate_input_grid, check_input_grid, put_input_grid

EXPONENTS = tuple(step / 20 for step in range(20, 9, -1))
"""1, 0.95, ... 0.5: those that are tried. The steps and the lower end are our assumption."""


@dataclass
class PowerPlan(LayerPlan):
    """How one layer's weight is put on a power grid.

    weight_bits: 2 to 8; 4 and less are stored in 4 bits, more in 8.
    objective: of the scales, applied to sign(w) |w|^exponent; none that looks at what the layer is fed.
    exponent: in [0.5, 1], of the whole layer; None: the one of EXPONENTS with the least squared error of the weight
        rounded to nearest, found while packing.
    """

    format: str = "power"
    exponent: float | None = None

    def check(self) -> None:
        super().check()
        if self.exponent is not None and not EXPONENTS[-1] <= self.exponent <= EXPONENTS[0]:
            raise ValueError(f"exponent is {self.exponent} and lies in [{EXPONENTS[-1]:g}, {EXPONENTS[0]:g}]")
        if OBJECTIVES.find(self.objective).needs:
            raise ValueError(f"the objective '{self.objective}' looks at what the layer is fed, which power does not")

    @property
    def simulated(self) -> bool:
        """Always: no product of integers computes it."""
        return True

    @property
    def groups_text(self) -> str:
        return (" in 4 bits" if self.weight_bits < 4 else "") + " power"


class PowerLayer(RoundedLayer):
    """What Linear and Conv2d on the power grid share; N outputs of K inputs.

    bias              [N] in the model's dtype, or None
    qweight           [N, K] int8, or [N, K'/2] uint8 for 4 bits and less, K' = K up to a multiple of 64
    wscales           [N, 1] float32, of sign(w) |w|^exponent
    exponent          [] float32; the plan's, beside the codes that are made by it
    input_scale       [] float32    static layers only
    input_zero_point  [] int32      static layers only
    """

    plan: PowerPlan
    kept = ("wscales", "exponent", "input_scale")
    scales = ("wscales", "exponent", "input_scale")
    wscales: Tensor
    exponent: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _allocate(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        outputs, inputs = shape[0], math.prod(shape[1:])
        packed = self.plan.weight_bits <= 4
        width = -(-inputs // PACKED) * PACKED // 2 if packed else inputs
        self.qweight = frozen(outputs, width, dtype=torch.uint8 if packed else torch.int8, device=device)
        self.wscales = frozen(outputs, 1, dtype=torch.float32, device=device)
        self.exponent = frozen(dtype=torch.float32, device=device)
        allocate_input_grid(self, self.plan, True, device)

    def parts(self, weight: Tensor, evidence: LayerEvidence | None) -> Iterator[tuple[Tensor, Any, Any]]:
        """As RoundedLayer has it; completes the plan by the exponent first."""
        if self.plan.exponent is None:
            self.plan = replace(self.plan, exponent=self._least(self.matrix(weight)))
        return super().parts(weight, evidence)

    def _least(self, matrix: Tensor) -> float:
        """The exponent of the least squared error of a weight [N, K]; the largest of those as good as each other."""
        errors = {exponent: self._error(matrix, exponent) for exponent in EXPONENTS}
        return min(EXPONENTS, key=lambda exponent: (errors[exponent], -exponent))

    def _error(self, matrix: Tensor, exponent: float) -> float:
        grid = self._grid(matrix, exponent)
        return float((matrix - grid.values(grid.codes(matrix))).square().sum(dtype=torch.float64))

    def grid(self, matrix: Tensor, evidence: LayerEvidence | None) -> PowerGrid:
        """The grid of some outputs of a float32 weight [N, K], by the plan, which has its exponent already."""
        if self.plan.exponent is None:
            raise ValueError("a power plan has its exponent before its grids: take `parts` or `rounded`.")
        return self._grid(matrix, self.plan.exponent)

    def _grid(self, matrix: Tensor, exponent: float) -> PowerGrid:
        plan = self.plan
        uniform = weight_grid(raised(matrix, exponent), plan.weight_bits, plan.objective, plan.objective_parameter)
        return PowerGrid.over(uniform, exponent)

    def fill(self, codes: Tensor, grid: PowerGrid) -> None:
        """Set the layer's tensors from codes [N, K] on a grid, whose exponent is the plan's from now on."""
        self.plan = replace(self.plan, exponent=grid.exponent)
        exponent = torch.tensor(grid.exponent, dtype=torch.float32, device=codes.device)
        qweight = power_ops.stored_codes(codes, self.plan.weight_bits)
        self.put(qweight=qweight, wscales=grid.scales.float(), exponent=exponent)
        put_input_grid(self, self.plan, codes.device)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        check_input_grid(self.plan, tensors)
        if self.plan.exponent is None:
            raise ValueError("its plan has no 'exponent', which a packed layer of format power has")
        if not torch.equal(tensors["exponent"], torch.tensor(self.plan.exponent, dtype=torch.float32)):
            raise ValueError(f"'exponent' is {tensors['exponent'].item():g} and in the plan {self.plan.exponent:g}")

    def check_codes(self, tensors: Mapping[str, Tensor]) -> None:
        limit = weight_limit(self.plan.weight_bits)
        packed = tensors["qweight"]
        inputs = math.prod(self.weight_shape[1:])
        check_integers(power_ops.codes_of(packed, self.plan.weight_bits, inputs), "qweight", -limit, limit)

    def codes(self) -> Tensor:
        """The codes [N, ...], int8, unpacked in each call."""
        inputs = math.prod(self.weight_shape[1:])
        return power_ops.codes_of(self.qweight, self.plan.weight_bits, inputs).contiguous().view(self.weight_shape)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight [N, ...] that the codes stand for, made anew in each call."""
        plan, inputs = self.plan, math.prod(self.weight_shape[1:])
        exponent = cast(float, plan.exponent)  # a packed layer has one
        return self.shaped(power_ops.weight_of(self.qweight, self.wscales, exponent, plan.weight_bits, inputs))

    def kernel_name(self) -> str:
        """The kernel that serves this layer where its codes are now: the reference, wherever that is."""
        return dispatch.find(dispatch.Query("power", "int8", device=self.qweight.device)).name

    @property
    def operands(self) -> tuple:
        """The arguments of the power ops after x: codes, their grid, bias, the input's grid and its bits."""
        plan = self.plan
        return (
            self.qweight, self.wscales, plan.exponent, plan.weight_bits, self.added, self.input_scale,
            self.input_zero_point, plan.activation_bits,
        )  # fmt: skip


class PowerLinear(PowerLayer, QuantizedLinear):
    """y = x W^T + b, W from a codebook: x [..., K] float -> [..., N] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return power_ops.power_linear(input, *self.operands)


class PowerConv2d(PowerLayer, QuantizedConv2d):
    """Zero-padded convolution, W from a codebook: x [B, C, H, W] float -> [B, N, H', W'] in x's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return power_ops.power_conv2d(input, *self.operands, *self.geometry)


register_format("power", plan=PowerPlan, layers={nn.Linear: PowerLinear, nn.Conv2d: PowerConv2d}, grid="power")
