"""The choices of a layer, or of an attention, in a plan: their classes, and whether they are what they should be.

A class says more than its annotations with `check()`, of the values, and `check_layer(layer)`, of a float layer; both
raise ValueError. Formats with choices of their own have their classes in their own files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from ..checks import check_types, shown
from ..errors import DamagedFile, UserError
from ..files.outside import checked_object, reason
from ..kernels.formats import attention8
from ..ranges.registry import objective_parameter
from ..rounding.registry import ROUNDERS
from .registry import FORMATS

BITS = range(2, 9)
GROUP_SIZES = (None, 32, 64, 128)
ATTENTION_KINDS = tuple(attention8.TYPES)
PLAN = "the plan"  # where choices are from, in messages
FLOAT_INPUTS = 16  # bits of inputs that are not rounded


@dataclass
class LayerPlan:
    """How one layer is quantized to 8 bits.

    format: the number format, a name in `registry.FORMATS`.
    weight_bits, activation_bits: width of the grids; 8 and 8 are what the kernels are made for, others are
        computed on a narrower grid of the same int8 codes (`simulated`).
    objective: the range objective of the weight scales (`ranges.OBJECTIVES`), with its `objective_parameter`.
    input_scale, input_zero_point: the static activation grid; None for dynamic activations. FP8 has no zero point.
    rounding: how the weight is rounded (`rounding.ROUNDERS`).
    """

    input_widths: ClassVar[Sequence[int]] = BITS
    format: str = "int8"
    weight_bits: int = 8
    activation_bits: int = 8
    objective: str = "max"
    objective_parameter: float | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None
    rounding: str = "nearest"

    def check(self) -> None:
        """Raises ValueError where a choice is out of its range, or does not go with another."""
        if self.weight_bits not in BITS or self.activation_bits not in self.input_widths:
            raise ValueError(f"widths are from 2 to 8 bits, not {self.weight_bits} and {self.activation_bits}")
        e4m3 = FORMATS.find(self.format).grid == "e4m3"
        if e4m3 and (self.weight_bits, self.activation_bits) != (8, 8):
            raise ValueError(f"{self.format} has 8 bits, not {self.weight_bits} and {self.activation_bits}")
        objective_parameter(self.objective, self.objective_parameter)
        ROUNDERS.find(self.rounding)
        self._check_input_grid(affine=not e4m3)

    def _check_input_grid(self, affine: bool) -> None:
        scale, zero = self.input_scale, self.input_zero_point
        if self.activation_bits == FLOAT_INPUTS and (scale, zero) != (None, None):
            raise ValueError("inputs of 16 bits stay floats and have no grid")
        if scale is not None and not 0 < torch.tensor(scale, dtype=torch.float32).item() < float("inf"):
            raise ValueError(f"input_scale is {scale} and should be above zero, as a float32")
        if (zero is not None) != (affine and scale is not None):
            raise ValueError("input_scale and input_zero_point go together, but in fp8, which has no zero point")
        half = 2 ** (self.activation_bits - 1)
        if zero is not None and not -half <= zero < half:
            raise ValueError(f"input_zero_point is {zero} and lies in [{-half}, {half - 1}] in these bits")

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where the choices do not fit a float layer."""

    @property
    def static(self) -> bool:
        return self.input_scale is not None

    @property
    def simulated(self) -> bool:
        return (self.weight_bits, self.activation_bits) != (8, 8)

    def __str__(self) -> str:
        kind = "static" if self.static else "dynamic"
        bits = "FP8" if FORMATS.find(self.format).grid == "e4m3" else f"W{self.weight_bits}A{self.activation_bits}"
        name = f"{bits}{self.groups_text}"
        name = name if self.activation_bits == FLOAT_INPUTS else f"{name} {kind}"
        return f"{name} (simulated)" if self.simulated else name

    @property
    def groups_text(self) -> str:
        """Text for the inputs that share a weight scale, where a row has several."""
        return ""


@dataclass
class GroupedPlan(LayerPlan):
    """How one layer gets weights stored in 4 bits, under inputs of 8: what the formats of such weights share.

    group_size: inputs per weight scale, 32, 64 or 128; None gives each output one. The inputs of a convolution are
        taken pixel by pixel of its window, so that a group holds channels of one pixel.
    """

    weight_bits: int = 4
    group_size: int | None = None

    def check(self) -> None:
        super().check()
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is none, 32, 64 or 128, not {self.group_size}")

    def check_layer(self, layer: nn.Module) -> None:
        check_groups(layer, self.group_size or 1)

    @property
    def simulated(self) -> bool:
        return self.activation_bits not in (8, FLOAT_INPUTS)

    @property
    def groups_text(self) -> str:
        return "" if self.group_size is None else f" g{self.group_size}"


@dataclass
class Int4Plan(GroupedPlan):
    """How one layer gets weights stored in 4 bits, under inputs of 8; or of 16, which are floats as they come.

    weight_bits: 4, or 2 and 3: a narrower grid of the same codes, with the bytes and the kernels of 4 bits.
    affine: scales with zero points.
    """

    input_widths: ClassVar[Sequence[int]] = (*BITS, FLOAT_INPUTS)
    format: str = "int4"
    affine: bool = False

    def check(self) -> None:
        super().check()
        if self.weight_bits > 4:
            raise ValueError(f"int4 has weights of 4 bits and less, not {self.weight_bits}")

    @property
    def groups_text(self) -> str:
        stored = "" if self.weight_bits == 4 else " in 4 bits"
        return stored + super().groups_text + (" affine" if self.affine else "")


@dataclass
class AttentionPlan:
    """How one attention is computed in 8 bits: kernels/formats/attention8.py.

    kind: of queries and keys, "int8" or "e4m3". error: of its output beside attention as it was, as a share of its
    norm, where it was measured.
    """

    kind: str = "int8"
    error: float | None = None

    def check(self) -> None:
        """Raises ValueError where a choice is out of its range."""
        if self.kind not in ATTENTION_KINDS:
            raise ValueError(f"queries and keys are in {' or '.join(ATTENTION_KINDS)}, not {shown(self.kind)}")
        if self.error is not None and not (type(self.error) in (int, float) and 0 <= self.error < float("inf")):
            raise ValueError(f"its error is a number from 0 on, not {shown(self.error)}")


def check_choices(name: str, choices: Any, where: str = PLAN) -> None:
    """Raises UserError, naming the layer and where it is from, where its choices are not of their type or out of
    range."""
    kind = FORMATS.find(getattr(choices, "format", "")).plan
    if type(choices) is not kind:
        raise UserError(
            f"layer '{name}' of {where}: format '{choices.format}' takes a {kind.__name__}, not a "
            f"{type(choices).__name__}."
        )
    with _in_layer(name, where):
        check_types(choices)
        getattr(choices, "check", lambda: None)()


def check_fit(name: str, choices: Any, layer: nn.Module, where: str = PLAN) -> None:
    """Raises UserError as `check_choices` does, where choices do not fit the float layer that it is."""
    with _in_layer(name, where):
        getattr(choices, "check_layer", lambda _: None)(layer)


@contextmanager
def _in_layer(name: str, where: str = PLAN) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DamagedFile(f"layer '{name}' of {where}: {reason(error)}.") from None


def check_groups(layer: nn.Module, size: int) -> None:
    """Raises ValueError where the inputs of each group of a layer's outputs do not divide into groups of a size."""
    inputs = layer.weight.shape[1]
    if inputs % size:
        raise ValueError(f"{inputs} inputs do not divide into groups of {size}")


def choices_of(name: str, choices: Any) -> Any:
    """The choices of a layer from what JSON holds of them, not checked yet. Raises DamagedFile."""
    with _in_layer(name):
        checked_object(choices, {"format": str})
        kind = FORMATS.find(choices["format"]).plan
        known = {item.name for item in fields(kind)}
        if unknown := sorted(map(str, set(choices) - known)):
            raise ValueError(f"nobody knows its entry '{unknown[0]}'")
        return kind(**choices)


def as_plan_of(kind: type, plan: Any, **more: Any) -> Any:
    """The choices of a plan, but for its format, as a plan of a class that has more of them."""
    return kind(**{item.name: getattr(plan, item.name) for item in fields(plan) if item.name != "format"} | more)
