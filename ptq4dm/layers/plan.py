"""A plan: for each layer of one model, the choices that fix its codes bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import UserError
from ..files.atomic import replacing


@dataclass
class LayerPlan:
    """How one layer is quantized.

    format: the number format, a key of `modules.FORMATS`.
    weight_bits, activation_bits: width of the grids; 8 and 8 are what the kernels are made for, others are
        computed on a narrower grid of the same int8 codes (`simulated`).
    objective: the range objective of the weight scales (`ranges.OBJECTIVES`), with its `objective_parameter`.
    input_scale, input_zero_point: the static activation grid; None for dynamic activations. FP8 has no zero point.
    """

    format: str = "int8"
    weight_bits: int = 8
    activation_bits: int = 8
    objective: str = "max"
    objective_parameter: float | None = None
    input_scale: float | None = None
    input_zero_point: int | None = None

    @property
    def static(self) -> bool:
        return self.input_scale is not None

    @property
    def simulated(self) -> bool:
        return (self.weight_bits, self.activation_bits) != (8, 8)

    def __str__(self) -> str:
        kind = "static" if self.static else "dynamic"
        name = "FP8" if self.format == "fp8" else f"W{self.weight_bits}A{self.activation_bits}"
        name = f"{name} {kind}"
        return f"{name} (simulated)" if self.simulated else name


# format -> the dataclass of a layer's choices in it; a method with a format of its own adds one.
PLANS: dict[str, type] = {"int8": LayerPlan, "fp8": LayerPlan}


@dataclass
class Plan:
    """method: who made it; layers: module name -> its choices, of the class that PLANS names for their `format`.

    Layers not named keep their precision.
    """

    method: str
    layers: dict[str, LayerPlan] = field(default_factory=dict)

    def to_dict(self) -> dict:
        return {"method": self.method, "layers": {name: asdict(layer) for name, layer in self.layers.items()}}

    @classmethod
    def from_dict(cls, data: dict) -> Plan:
        try:
            layers = {name: PLANS.get(layer["format"], LayerPlan)(**layer) for name, layer in data["layers"].items()}
            return cls(data["method"], layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"this is not a plan written by ptq4dm ({error}).") from None

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read a plan from {path}: {error}.") from None
