"""A plan: for each layer of one model, the choices that fix its codes bit for bit."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..checks import check, checked, shown
from ..errors import DamagedFile, UserError
from ..files.atomic import replacing
from ..files.outside import TensorFile, checked_object, described, naming, outside, read_json, read_tensors
from ..files.tensors import write_tensors
from ..kernels.formats import attention8
from ..ranges.registry import objective_parameter
from ..rounding.learned import Learning, learning_from
from ..rounding.registry import ROUNDERS
from ..transforms.base import TransformPlan
from .choices import check_choices, check_groups, choices_of
from .registry import FORMATS

BITS = range(2, 9)
GROUP_SIZES = (None, 32, 64, 128)
ATTENTION_KINDS = tuple(attention8.TYPES)
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


def check_group_size(size: int | None) -> None:
    """Raises ValueError for a size that no format has groups of."""
    if size not in GROUP_SIZES:
        raise ValueError(f"group_size is none, 32, 64 or 128, not {size}")


@dataclass
class Int4Plan(LayerPlan):
    """How one layer gets weights stored in 4 bits, under inputs of 8; or of 16, which are floats as they come.

    weight_bits: 4, or 2 and 3: a narrower grid of the same codes, with the bytes and the kernels of 4 bits.
    group_size: inputs per weight scale, 32, 64 or 128; None gives each output one. The inputs of a convolution are
        taken pixel by pixel of its window, so that a group holds channels of one pixel.
    affine: scales with zero points.
    """

    input_widths: ClassVar[Sequence[int]] = (*BITS, FLOAT_INPUTS)
    format: str = "int4"
    weight_bits: int = 4
    group_size: int | None = None
    affine: bool = False

    def check(self) -> None:
        super().check()
        if self.weight_bits > 4:
            raise ValueError(f"int4 has weights of 4 bits and less, not {self.weight_bits}")
        check_group_size(self.group_size)

    def check_layer(self, layer: nn.Module) -> None:
        check_groups(layer, self.group_size or 1)

    @property
    def simulated(self) -> bool:
        return self.activation_bits not in (8, FLOAT_INPUTS)

    @property
    def groups_text(self) -> str:
        stored = "" if self.weight_bits == 4 else " in 4 bits"
        groups = "" if self.group_size is None else f" g{self.group_size}"
        return stored + groups + (" affine" if self.affine else "")


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


def _attention_from(data: Any) -> AttentionPlan:
    """The plan of a dict; ValueError where it is none."""
    found = checked_object(data, {"kind": str, "error": (float, int, type(None))})
    return AttentionPlan(found["kind"], found["error"])


@dataclass
class Plan:
    """What was decided for one model.

    method: who made it.
    layers: module name -> its choices, of the class that its `format` registered. Layers not named keep their
        precision.
    transforms: changes of the model that keep its function, made in this order before anything is quantized.
    learning: how blocks of layers whose rounding is "learned" are trained; None where each layer is by itself.
    starts: of these layers, the static input grids [scale, zero point] that training began with; filled by packing.
    attention: name of an attention -> how it is computed in 8 bits; attention that is not named stays as it is.
    packing: what codes depend on beside the calibration store (quantization.packing.PackingOptions), for plans whose
        formats, roundings or objectives look at it.
    norms: GroupNorms and LayerNorms that the model has as L1 normalization (layers.shift.norms), by name, with the
        ratio of each; they were trained so.
    """

    method: str
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    transforms: list[TransformPlan] = field(default_factory=list)
    learning: Learning | None = None
    starts: dict[str, list] = field(default_factory=dict)
    packing: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.method, str, "Plan: method")
        check(self.transforms, list[TransformPlan], "Plan: transforms")
        check(self.learning, Learning | None, "Plan: learning")
        check(self.starts, dict[str, Any], "Plan: starts")
        check(self.packing, dict[str, Any], "Plan: packing")
        check(self.norms, dict[str, float], "Plan: norms")
        check(self.attention, dict[str, AttentionPlan], "Plan: attention")
        for name, layer in check(self.layers, dict[str, Any], "Plan: layers").items():
            if isinstance(layer, type) or not is_dataclass(layer):  # each format has a class of plans of its own
                raise UserError(f"Plan: layers must be plans of layers by name; '{name}' is {shown(layer)}.")

    def to_dict(self) -> dict:
        """The plan as JSON holds it; tensors of transforms are not in it."""
        data: dict[str, Any] = {
            "method": self.method,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }
        if self.transforms:
            data["transforms"] = [transform.to_dict() for transform in self.transforms]
        if self.learning is not None:
            data["learning"], data["starts"] = asdict(self.learning), self.starts
        if self.packing:
            data["packing"] = self.packing
        if self.norms:
            data["norms"] = self.norms
        if self.attention:
            data["attention"] = {name: asdict(one) for name, one in self.attention.items()}
        return data

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of all transforms, named "<number>/<name>"."""
        return {
            f"{number}/{name}": tensor
            for number, transform in enumerate(self.transforms)
            for name, tensor in transform.tensors.items()
        }

    def copy(self) -> Plan:
        """A plan of its own, whose layers may be completed."""
        return copy.deepcopy(self)

    @classmethod
    def from_dict(cls, data: dict, tensors: dict[str, torch.Tensor] | None = None) -> Plan:
        """The plan of a dict. Raises DamagedFile where it is none, or names a format or a choice that nobody knows.

        The values of choices are looked at by `check`, which whoever loads or follows a plan calls.
        tensors: those of its transforms; without them (None) a packed model can be loaded, but the plan not followed.
        """
        check(data, dict[str, Any], "a plan")
        with outside("a plan written by ptq4dm", "save it again"):
            checked_object(data, {"method": str, "layers": dict})
            layers = {name: choices_of(name, layer) for name, layer in data["layers"].items()}
            found = data.get("transforms", [])
            if not isinstance(found, list):
                raise ValueError(f"its 'transforms' is {described(found)}")
            transforms = [
                TransformPlan.from_dict(
                    transform,
                    None if tensors is None else {
                        name.partition("/")[2]: tensor
                        for name, tensor in tensors.items()
                        if name.partition("/")[0] == str(number)
                    },
                )
                for number, transform in enumerate(found)
            ]  # fmt: skip
            learning = None if data.get("learning") is None else learning_from(data["learning"])
            starts, packing, norms = (
                checked_object(data.get(name, {}), {}) for name in ("starts", "packing", "norms")
            )
            attention = {
                name: _attention_from(one) for name, one in checked_object(data.get("attention", {}), {}).items()
            }
            return cls(data["method"], layers, transforms, learning, starts, packing, attention, norms)

    def check(self) -> None:
        """Raises UserError, naming the layer, where choices are not of their type, out of range or at odds.

        Of transforms, options and tensors are what their kind says; `apply_all` compares them with the model.
        """
        for transform in self.transforms:
            transform.check()
        for name, choices in self.layers.items():
            check_choices(name, choices)
        if self.learning is not None:
            self.learning.check()
        for name, ratio in self.norms.items():
            if not 0.1 < ratio < 100:
                raise DamagedFile(f"the plan is damaged: norm '{name}' has the ratio {ratio}.")
        for name, start in self.starts.items():
            self._check_start(name, start)
        for name, one in self.attention.items():
            try:
                one.check()
            except ValueError as error:
                raise DamagedFile(f"the plan is damaged: of attention '{name}', {error}.") from None
        for name, choices in self.layers.items():
            leader = FORMATS.find(choices.format).leader(name, choices)
            lends = self.layers.get(leader)
            if type(lends) is not type(choices) or FORMATS.find(lends.format).leader(leader, lends) != leader:
                raise DamagedFile(
                    f"the plan is damaged: layer '{name}' borrows from '{leader}', which has nothing to lend."
                )

    def _check_start(self, name: str, start: Any) -> None:
        """Raises UserError where a start is not one of a layer of the plan."""
        choices = self.layers.get(name)
        if choices is None or not isinstance(start, list) or len(start) != 2:
            raise DamagedFile(f"the plan is damaged: its start of '{name}' is no input grid of a layer.")
        try:
            begun = replace(choices, input_scale=start[0], input_zero_point=start[1])
        except TypeError:
            raise DamagedFile(f"the plan is damaged: layer '{name}' has no input grid to start from.") from None
        if begun.static != choices.static:
            raise DamagedFile(f"the plan is damaged: its start of '{name}' is none of the layer's.")
        check_choices(name, begun)

    @checked
    def save(self, path: str | os.PathLike) -> None:
        """Write the plan into a JSON file, and tensors of transforms, if any, beside it, as .safetensors.

        Raises UserError where they cannot be written.
        """
        path = Path(path)
        tensors = self.tensors()
        if any(tensor.is_meta for tensor in tensors.values()):
            raise UserError("the plan's transforms came without their tensors, as a loaded model has them.")
        if tensors:
            write_tensors(path.with_suffix(".safetensors"), tensors)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read what `save` wrote. Raises DamagedFile where it cannot be read."""
        path = Path(path)
        data = read_json(path, "give a plan that ptq4dm has saved")
        if isinstance(data, dict) and isinstance(data.get("components"), dict):
            raise UserError(f"{path} holds the plans of several networks ({', '.join(data['components'])}).")
        beside = path.with_suffix(".safetensors")
        tensors = read_tensors(beside, TensorFile.tensors) if beside.is_file() else {}
        with naming(path):
            plan = cls.from_dict(data, tensors)
            plan.check()
            return plan
