"""Recipes: a method is a dataclass that turns layers and calibration into a plan.

A method registers itself with `@register("name")`; nothing here knows which methods exist. Every recipe is a
diffusers quantization config, so `from_pretrained(..., quantization_config=recipe)` works, and is written into the
config.json of a quantized model together with its plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..calibration.store import CalibrationStore
from ..checks import check, check_fields, check_types, choices_of, named_options
from ..errors import UserError, unknown_option
from ..files.outside import checked_object, outside
from ..layers.plan import LayerPlan, Plan
from ..layers.view import LayerView
from ..options import has_option, no_choice, option
from ..registry import Registry
from ..rounding.learned import Learning
from ..transforms.base import is_online
from ..transforms.named import check_together, named
from .checksums import checked_sums
from .packing import PackingOptions, pack_plan, packing_of

_Config = TypeVar("_Config", bound="QuantConfig")

METHODS: Registry = Registry("quantization method", late=True)
DEFAULTS: Registry = Registry("kind of network", late=True)
"""Kind of network (pipelines/parts.py) -> the recipe of such a network for which a user names none."""


def _always(value: Any) -> str:
    """The end of "..., which": what an option is that a method has fixed."""
    return "takes none" if value is None else f"has {value!r}"


def _holders(option_name: str) -> list[str]:
    """Names of the methods of which an option is a user's choice."""
    return [name for name in METHODS.offered() if has_option(METHODS[name], option_name)]


class QuantMethod(str, Enum):
    """diffusers wants an enum here; all our methods share one loader."""

    PTQ4DM = "ptq4dm"


def register(name: str) -> Callable[[type[_Config]], type[_Config]]:
    """Class decorator: make a config class known by its method name. Options that it does not have are refused."""

    def add(cls: type[_Config]) -> type[_Config]:
        cls.method = name
        return METHODS.add(name, named_options(cls, _holders))

    return add


@named_options
@dataclass(repr=False)
class QuantConfig(QuantizationConfigMixin):
    """What every method has.

    modules_to_not_convert: names or shell patterns of modules to keep in full precision.
    calibration: folder of a calibration store, for methods that need one while loading
        (`from_pretrained(..., quantization_config=PTQ4DMConfig(calibration="store"))`).
    plan: what to follow instead of resolving the recipe; a quantized model carries its config with its plan
        (`ptq4dm.quantization_config(model).plan`).
    transforms: names of transforms (transforms.TRANSFORMS) that change the float model, not its function, before
        anything is quantized; in the order named. "smooth:alpha=0.3" names one with an option of its own.
    """

    method: ClassVar[str]
    packs_while_loading: ClassVar[bool] = True  # else a model must be there in full precision
    loaded_only: ClassVar[bool] = False  # models of this method come from files of another library, or of training
    norms_only: ClassVar[bool] = False  # what a model in floats is saved with whose norms are not its class's
    quant_method: ClassVar[QuantMethod] = QuantMethod.PTQ4DM
    modules_to_not_convert: tuple[str, ...] = option((), "names or patterns of layers to leave alone")
    calibration: str | None = option(None, "folder of a calibration store", flag=False)
    plan: Plan | None = option(None, "choices to follow", flag=False)
    transforms: tuple[str, ...] = option(
        (), "changes that keep the model's function (smooth, rotate, hadamard:64, ...)"
    )

    def __post_init__(self) -> None:
        self.checksums: dict | None = None  # of a saved model's tensors (checksums.py); no choice, so no field
        if not hasattr(type(self), "method"):
            raise UserError(
                "QuantConfig is what all recipes share; take one of them, also for a plan: RTNConfig, ..."
            )
        if isinstance(self.transforms, str) or isinstance(self.modules_to_not_convert, str):
            raise UserError("transforms and modules_to_not_convert are tuples of names, also where there is one.")
        for name in ("modules_to_not_convert", "transforms"):
            if getattr(self, name) is None:
                setattr(self, name, ())
        if isinstance(self.calibration, os.PathLike):
            self.calibration = os.fspath(self.calibration)
        if isinstance(self.plan, dict):
            self.plan = Plan.from_dict(self.plan)
        if not (self.plan is None or isinstance(self.plan, Plan)):
            raise UserError(f"plan is a Plan, from Plan.load(path); got {type(self.plan).__name__}.")
        check_fields(self, type(self).__name__)
        fixed = no_choice(self)
        if fixed is not None and self.plan is None:  # of a plan that is there, options tell how it was made
            others = ", ".join(_holders(fixed.name))
            raise UserError(
                f"{fixed.name} is no choice of {type(self).__name__}, which {_always(fixed.default)}; leave it out"
                + (f", or take a method that has it: {others}." if others else ".")
            )
        self.modules_to_not_convert, self.transforms = tuple(self.modules_to_not_convert), tuple(self.transforms)
        for text in self.transforms:
            named(text)
        if self.plan is None:  # of a plan that is there, options tell how it was made
            check_together(self.changes)

    @property
    def changes(self) -> tuple[str, ...]:
        """The transforms that are made, those of the method itself among them, in their order."""
        return self.transforms

    @property
    def rotates(self) -> bool:
        """Whether a transform rotates what layers are fed, in every call."""
        return any(is_online(named(text)[0].name) for text in self.changes)

    @property
    def needs_calibration(self) -> bool:
        """Whether a store is needed to resolve the recipe: for its transforms, if for nothing else."""
        return any(named(text)[0].needs for text in self.changes)

    @property
    def looks_at_tuples(self) -> bool:
        """Whether anything of the recipe looks at calibration tuples, so that their number counts."""
        return True

    @property
    def awaited_calls(self) -> int:
        """Calls of a network's own use that it waits for where there is no store; 0 for none."""
        return 0

    def otherwise(self, loading: bool = False) -> str:
        """What else a user could do than give a store, as the end of a sentence that asks for one; "" for nothing.

        loading: than load the model in full precision, at the end of a sentence that asks for that.
        """
        return ""

    def resolve(
        self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None
    ) -> dict[str, LayerPlan]:
        """The method itself: layer name -> choices. `store` is a CalibrationStore or None."""
        raise NotImplementedError

    def check_reach(self, model: nn.Module) -> None:
        """Raises UserError where what is asked for is out of the model's reach, as far as no calibration tells it."""

    def learning(self) -> Learning | None:
        """How blocks are trained whose layers have "learned" rounding; None rounds each layer by itself."""
        return None

    def pack(
        self, model: nn.Module, plan: Plan, store: CalibrationStore | None, checkpoint: str | Path | None = None
    ) -> tuple[dict[str, nn.Module], Plan]:
        """(the quantized layers of a plan by name, the plan completed); the model stays as it is. See `pack_plan`."""
        made_by = METHODS.get(plan.method)
        if made_by is not None and made_by.loaded_only:
            raise UserError(
                f"the plan is of '{plan.method}', of layers read from a checkpoint: their codes cannot be made anew."
            )
        return pack_plan(model, plan, store, packing_of(plan.packing or self.packing_options()), checkpoint)

    def packing_options(self) -> dict[str, Any]:
        """The PackingOptions that the recipe says something of, by name."""
        return {item.name: getattr(self, item.name) for item in fields(PackingOptions) if hasattr(self, item.name)}

    def resolved(self, found: Any) -> Any:
        """What resolving the recipe found. Raises UserError while that is None, as it is before."""
        if found is None:
            raise UserError(
                f"this {type(self).__name__} has no outcome: nothing was quantized with it yet, or it followed a "
                "plan, or had several networks, of which each is quantized with a copy."
            )
        return found

    def found(self) -> dict[str, Any]:
        """What resolving the recipe found that a report should tell: plain JSON values, with "text", a line of its
        table; {} for nothing."""
        return {}

    # --- diffusers' side ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"quant_method": self.quant_method.value, "method": self.method}
        for item in fields(self):
            value = getattr(self, item.name)
            data[item.name] = value.to_dict() if isinstance(value, Plan) else value
        if self.checksums is not None:
            data["checksums"] = self.checksums
        return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Any method's config from its dict, by the `method` entry.

        Raises UserError where the dict is none, names a method or an option that nobody knows, or holds a value that
        is not of its type; of its plan, also a value that is out of range.
        """
        check(config_dict, dict[str, Any], "a recipe's config")
        with outside("a quantization_config of ptq4dm", "save the model again"):
            checked_object(config_dict, {})
        data = {k: v for k, v in {**config_dict, **kwargs}.items() if k != "quant_method"}
        sums = data.pop("checksums", None)
        name = data.pop("method", getattr(cls, "method", None))
        target = METHODS.find(name)
        known = {item.name for item in fields(target)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise unknown_option(target.__name__, unknown, choices_of(target), _holders(unknown[0]))
        with outside(f"the options of {target.__name__}", "save the model again"):
            config = target(**data)
            check_types(config)
            if config.plan is not None:
                config.plan.check()
            config.checksums = None if sums is None else checked_sums(sums)
        return (config, {}) if return_unused_kwargs else config

    def summary(self) -> dict[str, Any]:
        """The options that differ from the defaults, for reports and file metadata."""
        changed: dict[str, Any] = {"method": self.method}
        default = type(self)()
        for name in (item.name for item in fields(self) if item.name not in ("plan", "calibration")):
            if getattr(self, name) != getattr(default, name):
                changed[name] = getattr(self, name)
        return changed
