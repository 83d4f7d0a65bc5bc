"""What RTN and PTQ4DM share: 8-bit or narrower weights per output channel, inputs per tensor or token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UserError
from ..kernels.formats import fp8
from ..layers.plan import LayerPlan
from ..layers.view import LayerView
from ..quantization.options import option
from ..quantization.recipe import QuantConfig
from ..ranges.clipping import activation_grid, objective_parameter

NUMBER_FORMATS = ("int8", "fp8")
FIRST_LAST = ("int8", "same", "keep")
ACTIVATIONS = ("static", "dynamic")


@dataclass(repr=False)
class IntegerConfig(QuantConfig):
    """Quantization of weights and inputs of every Linear and Conv2d.

    format: "int8", or "fp8": e4m3 floats, 8 and 8 bits, symmetric, with ranges that reach to the largest value
        whatever the objective (their steps grow with the value, so there is little to gain by clipping).
    weight_bits, activation_bits: 2..8. 8 and 8 are real; narrower grids are `simulated` (int8 containers).
    activations: "static" (one scale and zero point per tensor, from calibration) or "dynamic" (symmetric, per
        token in Linear and per sample in Conv2d, computed in each call; needs no calibration). A layer that
        calibration never reached is "dynamic" in either case.
    symmetric: static activation grids without a zero point.
    first_last: the layers that read the model's input channels and write its output channels: "int8" (at
        least 8 bits, PTQ4DM's rule), "same" (no exception) or "keep" (full precision).
    """

    format: str = option("int8", "number format of weights and inputs", choices=NUMBER_FORMATS)
    weight_bits: int = option(8, "8; narrower grids are simulated in int8 containers")
    activation_bits: int = option(8, "8; narrower grids are simulated")
    activations: str = option("static", "input grids from calibration, or dynamic", choices=ACTIVATIONS)
    symmetric: bool = option(False, "static inputs without a zero point")
    first_last: str = option("int8", "the layers at the model's ends", choices=FIRST_LAST)

    def __post_init__(self):
        super().__post_init__()
        for name in ("weight_bits", "activation_bits"):
            if not (isinstance(getattr(self, name), int) and 2 <= getattr(self, name) <= 8):
                raise UserError(f"{name} must be a whole number from 2 to 8; got {getattr(self, name)!r}.")
        if self.format not in NUMBER_FORMATS:
            raise UserError(f"format must be 'int8' or 'fp8'; got '{self.format}'.")
        if self.format == "fp8" and (self.weight_bits, self.activation_bits) != (8, 8):
            raise UserError("format='fp8' has 8 bits; leave weight_bits and activation_bits at 8, or take 'int8'.")
        if self.activations not in ACTIVATIONS:
            raise UserError(f"activations must be 'static' or 'dynamic'; got '{self.activations}'.")
        if self.first_last not in FIRST_LAST:
            raise UserError(f"first_last must be one of {', '.join(FIRST_LAST)}; got '{self.first_last}'.")

    @property
    def needs_calibration(self) -> bool:
        return self.activations == "static"

    def layer_plan(self, view: LayerView, store, objective: str, parameter: float | None) -> LayerPlan | None:
        """One layer's plan under a range objective; None keeps the layer in full precision."""
        edge = view.role in ("first", "last")
        if edge and self.first_last == "keep":
            return None
        if self.format == "fp8":
            return self._fp8_plan(view, store)
        weight_bits, activation_bits = self.weight_bits, self.activation_bits
        if edge and self.first_last == "int8":
            weight_bits = activation_bits = 8
        parameter = objective_parameter(objective, parameter)
        plan = LayerPlan("int8", weight_bits, activation_bits, objective, parameter)
        if self.activations == "static":
            histogram, limit, low, high = store.input_of(view.name)
            if low > high:  # calibration never reached the layer: nothing is known of its input beforehand
                return plan
            device = view.module.weight.device
            histogram = histogram.to("cpu" if device.type == "meta" else device)  # the search is quick on a GPU
            plan.input_scale, plan.input_zero_point = activation_grid(
                histogram, limit, low, high, activation_bits, objective, parameter, self.symmetric
            )
        return plan

    def _fp8_plan(self, view: LayerView, store) -> LayerPlan:
        plan = LayerPlan("fp8")
        if self.activations == "static":
            _, _, low, high = store.input_of(view.name)
            if low <= high:
                scale = max(-low, high) / fp8.LIMIT
                plan.input_scale = scale if scale >= torch.finfo(torch.float32).tiny else 1.0
        return plan
