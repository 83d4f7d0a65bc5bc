"""A plan: for each layer of one model, the choices that fix its codes bit for bit."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checks import check, checked, shown
from ..errors import DamagedFile, UserError
from ..files.atomic import replacing
from ..files.outside import TensorFile, checked_object, described, naming, outside, read_json, read_tensors
from ..files.tensors import write_tensors
from ..rounding.learned import Learning, learning_from
from ..transforms.base import TransformPlan, check_apart
from .choices import (
    ATTENTION_KINDS,
    BITS,
    FLOAT_INPUTS,
    GROUP_SIZES,
    AttentionPlan,
    Int4Plan,
    LayerPlan,
    check_choices,
    choices_of,
)
from .registry import FORMATS

__all__ = [  # a plan and what it is made of
    "ATTENTION_KINDS", "BITS", "FLOAT_INPUTS", "GROUP_SIZES", "AttentionPlan", "Int4Plan", "LayerPlan", "Plan",
]  # fmt: skip


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
        check_apart(self.transforms)
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
