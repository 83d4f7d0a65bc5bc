"""Values of the types that a dataclass's annotations name: what came from outside, before anybody works with it."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from functools import cache
from typing import Any

from .outside import described

LARGEST = 2**63 - 1  # of an integer: what 64 bits hold


def check_types(one: Any) -> None:
    """Raises ValueError, naming the field, where a dataclass holds a value that is not of its annotated type.

    A bool is no int, an int is a float, and floats are finite; a list stands for a tuple, as JSON has it.
    """
    kinds = _annotations(type(one))  # type: ignore[arg-type]  # mypy takes no class for hashable
    for item in fields(one):
        value, kind = getattr(one, item.name), kinds.get(item.name, Any)
        if not fits(value, kind):
            raise ValueError(f"{item.name} is {described(value)} and should be {words(kind)}")


@cache
def _annotations(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a class of others, with names that only its own function knows: nothing to compare with
        return {}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as annotations write it; True for types that are not known here."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if kind in (None, type(None)):
        return value is None
    if kind is int:
        return _whole(value)
    if kind is float:
        return _whole(value) or (isinstance(value, float) and math.isfinite(value))
    if origin in (list, tuple) or kind in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and Ellipsis not in parts:
            return len(value) == len(parts) and all(map(fits, value, parts))
        return not parts or all(fits(one, parts[0]) for one in value)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            return False
        return not parts or all(fits(name, parts[0]) and fits(one, parts[1]) for name, one in value.items())
    return isinstance(value, kind) if isinstance(kind, type) else True


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "none"}


def words(kind: Any) -> str:
    """A type in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(part) for part in parts)
    if origin in (list, tuple) or kind in (list, tuple):
        return "a list" + (f" of {_several(parts[0])}" if parts else "")
    if origin is dict or kind is dict:
        return "a table"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _several(kind: Any) -> str:
    return {int: "whole numbers", float: "finite numbers", str: "texts"}.get(kind, f"{words(kind)} each")
