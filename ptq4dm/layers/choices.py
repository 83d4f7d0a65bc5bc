"""Whether a layer's choices are what they should be: by themselves, and for the layer that they are made for.

A plan's class says more than its annotations with `check()`, of the values, and `check_layer(layer)`, of a float
layer; both raise ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import nn

from ..checks import check_types
from ..errors import DamagedFile, UserError
from ..files.outside import checked_object, reason
from .registry import FORMATS


def check_choices(name: str, choices: Any) -> None:
    """Raises UserError, naming the layer, where its choices are not of their type or out of range."""
    kind = FORMATS.find(getattr(choices, "format", "")).plan
    if type(choices) is not kind:
        raise UserError(
            f"layer '{name}' of the plan: format '{choices.format}' takes a {kind.__name__}, not a "
            f"{type(choices).__name__}."
        )
    with _in_layer(name):
        check_types(choices)
        getattr(choices, "check", lambda: None)()


def check_fit(name: str, choices: Any, layer: nn.Module) -> None:
    """Raises UserError, naming the layer, where its choices do not fit the float layer that it is."""
    with _in_layer(name):
        getattr(choices, "check_layer", lambda _: None)(layer)


@contextmanager
def _in_layer(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DamagedFile(f"layer '{name}' of the plan: {reason(error)}.") from None


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
