"""Changes of a model that preserve its function: how they register, their plans, and applying these to a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..annotations import MOST, complaint, fits
from ..errors import UserError
from ..files.outside import checked_object, described, finite, outside
from ..registry import Registry

TRANSFORMS: Registry = Registry("transform")


@dataclass(eq=False)
class TransformPlan:
    """One change of a few layers that belong together.

    kind: its name in TRANSFORMS.
    modules: names of the layers that change.
    options: numbers and strings, as JSON holds them.
    tensors: what is too large for JSON (divisors, an order of channels), by name.
    """

    kind: str
    modules: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """What JSON holds of it: of the tensors their names and shapes, which `from_dict` looks for."""
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        return {"kind": self.kind, "modules": list(self.modules), "options": dict(self.options), "tensors": shapes}

    @classmethod
    def from_dict(cls, data: dict, tensors: Mapping[str, Tensor] | None) -> TransformPlan:
        """Put a plan and its tensors together again; further tensors are not looked at.

        tensors: None leaves them out: such a plan tells what was done to a model, and cannot be applied.

        Raises:
            UserError: the dict is not a plan, its kind is unknown, or a tensor is missing or of another shape.
        """
        with outside("a transform's plan written by ptq4dm", "save the plan again"):
            checked_object(data, {"kind": str, "modules": list, "options": dict, "tensors": dict})
            kind, modules, options = data["kind"], list(data["modules"]), dict(data["options"])
            shapes = {name: list(shape) for name, shape in data["tensors"].items()}
            if not (modules and fits(modules, list[str]) and fits(options, dict[str, bool | float | str | None])):
                raise ValueError("its modules are names, its options numbers and texts")
            for name, shape in shapes.items():
                if not fits(shape, list[int]) or any(size < 0 for size in shape) or math.prod(shape) > MOST:
                    raise ValueError(f"no tensor '{name}' has its shape")
        transform_named(kind)
        if tensors is None:
            return cls(
                kind, modules, options, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            )
        for name, shape in shapes.items():
            if name not in tensors:
                raise UserError(f"the plan of '{kind}' for {modules} lacks its tensor '{name}'; save the plan again.")
            if list(tensors[name].shape) != shape:
                raise UserError(
                    f"the tensor '{name}' of the plan of '{kind}' for {modules} has shape "
                    f"{list(tensors[name].shape)} and not {shape}: it is of another plan."
                )
        with outside(f"the plan of '{kind}' for {modules}", "save the plan again"):
            return cls(kind, modules, options, {name: finite(tensors[name], name) for name in shapes})

    def check(self) -> None:
        """Raises UserError where the kind knows that the plan can be of no model (`Transform.check_plan`)."""
        getattr(transform_named(self.kind), "check_plan", lambda plan: None)(self)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TransformPlan)
            and self.to_dict() == other.to_dict()
            and all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
        )


class Evidence(Protocol):
    """What was seen of a model's Linear layers while it ran; `peaks.Peaks` is one. None: that layer never ran."""

    def peak(self, name: str) -> Tensor | None:
        """The largest magnitude [K] in each channel of a layer's input."""

    def output_peak(self, name: str) -> Tensor | None:
        """The largest magnitude [N] in each channel of a layer's output, with its bias."""


class Transform(Protocol):
    """A kind of change. `needs` names the evidence that `find` reads: "peaks", "output_peaks"; empty for none.

    It may have `online`: True where nothing of the float model changes, and what layers are fed is rotated in every
    call instead, by the layers that a plan gets (layers/rotated). It may have `check_plan(plan)`, which raises
    UserError where a plan can be of no model; whoever loads or follows one calls it. Tensors may be on the meta
    device. Options of `find` are its keywords, all of them numbers; `check_options(**options)`, where it has one,
    raises UserError for those out of range, before any work.
    """

    name: str
    needs: frozenset[str]

    def find(self, model: nn.Module, evidence: Evidence | None, **options: Any) -> list[TransformPlan]:
        """Plans for all places of a model where the change is known to be exact; the model stays as it is."""

    def check(self, model: nn.Module, *plans: TransformPlan) -> Any:
        """Raises UserError where a plan does not fit the model."""

    def apply(self, model: nn.Module, *plans: TransformPlan) -> None:
        """Change the float weights in place. Raises UserError as `check` does, before anything changes."""


def check_holds(plan: TransformPlan, options: Mapping[str, Any], tensors: Mapping[str, torch.dtype]) -> None:
    """Raises UserError unless a plan has just these tensors, and of these options any, each of its type."""
    try:
        for name, value in plan.options.items():
            if name not in options:
                raise ValueError(f"it has no option '{name}'")
            if says := complaint(value, options[name], plain=True):
                raise ValueError(f"{name} {says}; got {described(value)}")
        if plan.tensors.keys() != tensors.keys():
            had, due = (", ".join(names) or "none" for names in (plan.tensors, tensors))
            raise ValueError(f"its tensors are {had} and should be {due}")
        for name, tensor in plan.tensors.items():
            if not tensor.is_meta and tensor.dtype != tensors[name]:
                raise ValueError(f"its tensor '{name}' is {tensor.dtype} and should be {tensors[name]}")
    except ValueError as error:
        raise UserError(f"the plan of '{plan.kind}' for {plan.modules}: {error}.") from None


def register_transform(name: str) -> Callable:
    """Class decorator: make a transform known by its name."""

    def add(cls: Any) -> Any:
        cls.name = name
        TRANSFORMS.add(name, cls())
        return cls

    return add


def transform_named(name: str) -> Transform:
    """The registered transform of a name; UserError if there is none."""
    return TRANSFORMS.find(name)


def is_online(kind: str) -> bool:
    """Whether a transform leaves the float model alone, and rotates what layers are fed in every call."""
    return getattr(transform_named(kind), "online", False)


def check_apart(plans: Iterable[TransformPlan]) -> None:
    """Raises UserError where two plans would undo or overwrite each other: the same change of the same layers, or two
    rotations of what one layer is fed in every call."""
    seen: set[tuple[str, ...]] = set()
    for plan in plans:
        online = is_online(plan.kind)
        for place in plan.modules if online else [" ".join(plan.modules)]:
            key = (("online" if online else plan.kind), place)
            if key in seen:
                what = (
                    f"two rotations of the input of '{place}'" if online else f"'{plan.kind}' of {plan.modules} twice"
                )
                raise UserError(f"the plan has {what}, of which only one could be made; quantize anew with one.")
            seen.add(key)


def apply_all(model: nn.Module, plans: Iterable[TransformPlan]) -> None:
    """Apply plans in their order, in place, to a model in full precision.

    Raises:
        UserError: a plan does not fit the model. Then nothing has changed.
    """
    plans = list(plans)
    check_apart(plans)
    runs = [(transform_named(kind), list(run)) for kind, run in groupby(plans, lambda plan: plan.kind)]
    for transform, run in runs:
        transform.check(model, *run)
    for transform, run in runs:
        transform.apply(model, *run)
