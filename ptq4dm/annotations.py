"""Annotations as checks: whether a value is what an annotation says, and what it asks for in words.

Of values from Python, NumPy's numbers and tensors that hold one number are taken for numbers, too (`plain=False`). Of
values from a file (`plain=True`) a number is JSON's: Python's own, finite, of at most 64 bits.
"""

from __future__ import annotations

import collections.abc as abc
import functools
import math
import os
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

LIST_KINDS = (list, tuple, set, frozenset, abc.Sequence, abc.Collection, abc.Iterable)
PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "True or False"}
MOST = 2**63 - 1  # what a number of 64 bits holds
NO_LIMITS: Mapping[str, Any] = {}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from a file is of a type as annotations write it; True for types that are not known here."""
    return complaint(value, kind, plain=True) is None


def complaint(value: Any, kind: Any, limited: Mapping[str, Any] = NO_LIMITS, plain: bool = False) -> str | None:
    """What a value must be ("must be a number"), where it is not; None where all is well.

    limited: "low", "high", "finite" by name, see `checks.limits`. plain: whether the value comes from a file.
    """
    own = type(value)
    if own is kind and not limited and (own is str or own is bool or (own is int and abs(value) <= MOST)):
        return None  # the short way: a plan has thousands of them
    low, high = limited.get("low"), limited.get("high")
    low = None if low is not None and low <= -MOST else low  # no bound that anybody means
    if not _is(value, kind, plain):
        return "must be " + described(kind) + _bounds(low, high)
    if isinstance(value, (str, os.PathLike)) and os.PathLike in get_args(kind) and not _can_be_a_path(value):
        return "must be a path that a file system can have"
    finite = limited.get("finite", True)
    for number in _numbers(value) if _speaks_of_numbers(kind) else ():
        if isinstance(number, int):
            if abs(number) > MOST and high is None and (plain or not isinstance(value, (list, tuple))):
                return "must be " + described(kind) + _bounds(-MOST if low is None else low, MOST)
        elif finite and not math.isfinite(number):
            return f"must be {described(kind)}{_bounds(low, high)}, not NaN or infinity"
        if low is not None and not number >= low and (high is None or high >= 10_000) and number is value:
            return f"must be at least {low:g}" if low else "must not be negative"
        if (low is not None and not number >= low) or (high is not None and not number <= high):
            return "must be " + described(kind) + _bounds(low, high)
    return None


@functools.cache
def _speaks_of_numbers(kind: Any) -> bool:
    if get_origin(kind) is abc.Callable:
        return False
    return kind in (int, float) or any(map(_speaks_of_numbers, get_args(kind)))


def _can_be_a_path(value: str | os.PathLike) -> bool:
    try:
        text = os.fsencode(value)
    except (UnicodeError, TypeError):
        return False
    return b"\0" not in text and max(map(len, text.split(b"/"))) <= 255 and len(text) < 4096


def _numbers(value: Any) -> list[int | float]:
    """The numbers in a value that may have to keep within limits."""
    value = plain_number(value)
    if isinstance(value, bool):
        return []
    if isinstance(value, (int, float)):
        return [value]
    if isinstance(value, (list, tuple)):
        return [number for one in value for number in _numbers(one)]
    if isinstance(value, dict):
        return [number for one in value.values() for number in _numbers(one)]
    return []


def _is(value: Any, kind: Any, plain: bool) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, (TypeVar, str)):
        return True
    if kind is None or kind is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(_is(value, one, plain) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is typing.Annotated:
        return _is(value, inner[0], plain)
    if kind in (bool, int, float):
        return _is_number(value if plain else plain_number(value), kind)
    kind = origin or kind
    if kind is type or kind is abc.Callable:
        return callable(value)
    if kind in LIST_KINDS:
        return _is_list(value, kind, inner, plain)
    if kind in (dict, abc.Mapping, abc.MutableMapping):
        pairs = inner or (Any, Any)
        return isinstance(value, kind) and all(
            _is(name, pairs[0], plain) and _is(one, pairs[1], plain) for name, one in value.items()
        )
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int if kind is int else (int, float))


def _is_list(value: Any, kind: Any, inner: tuple, plain: bool) -> bool:
    if isinstance(value, (str, bytes, Mapping)) or is_scalar(value):
        return False
    if kind in (list, tuple):  # a list in place of a tuple is what JSON makes of it
        kind = (list, tuple)
    if not isinstance(value, kind):  # arrays and tensors are iterable, and nothing more
        return False
    if kind in (abc.Iterable,) or not inner:
        return True
    if get_origin(inner) is None and len(inner) > 1 and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(_is(one, its, plain) for one, its in zip(value, inner, strict=True))
    return all(_is(one, inner[0], plain) for one in value)


def is_scalar(value: Any) -> bool:
    """Whether a value looks like something to walk through, and has no dimension (a tensor or an array of one)."""
    return getattr(value, "shape", None) == ()


def described(kind: Any) -> str:
    """What an annotation asks for, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", os.PathLike: "a path"}
    if kind in words:
        return words[kind]
    if kind is None or kind is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        found = list(dict.fromkeys(described(one) for one in inner))
        return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    kind = origin or kind
    if kind in LIST_KINDS:
        several = [one for one in inner if one is not Ellipsis]
        if kind is tuple and len(several) > 1 and several[-1:] == list(inner[-1:]):
            return f"{len(several)} {_plural(several[0])}"
        return f"a list of {_plural(several[0])}" if several and several[0] is not Any else "a list"
    if kind in (dict, abc.Mapping, abc.MutableMapping):
        return f"a dict of {_plural(inner[1])} by {_plural(inner[0])}" if inner and inner[1] is not Any else "a dict"
    if kind is type or kind is abc.Callable:
        return "a function or a class"
    name = getattr(kind, "__name__", str(kind))
    module = f"{kind.__module__}." if getattr(kind, "__module__", "") == "torch" else ""
    return f"{'an' if name[0] in 'AEIOUaeio' and not module else 'a'} {module}{name}"


def _plural(kind: Any) -> str:
    return PLURALS.get(kind) or f"values that are each {described(kind)}"


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if abs(high) < 1e6 else f" from {low:g} to {high}"
    return f" of {low:g} or more" if low is not None else "" if high is None else f" of at most {high}"


def annotations_of(owner: Any) -> dict[str, Any]:
    """Name -> annotation of a dataclass's fields, or of a function's arguments; Any where it has no value here."""
    if not isinstance(owner, type):
        return _resolved(owner.__annotations__, sys.modules[owner.__module__])
    return _fields_of(owner)


@functools.cache
def _fields_of(kind: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in reversed(kind.__mro__):
        found |= _resolved(vars(one).get("__annotations__", {}), sys.modules.get(one.__module__))
    return {item.name: found.get(item.name, Any) for item in fields(kind)}


def _resolved(annotations: Mapping[str, Any], module: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in annotations.items():
        if isinstance(kind, str):
            try:
                kind = eval(kind, vars(module) if module else {})  # our own source, not a user's text
            except Exception:
                kind = Any  # a name that is imported for editors only
        found[name] = kind
    return found


def plain_number(value: Any) -> Any:
    """A number of NumPy, or a tensor of no dimensions, as Python's int, float or bool; anything else as it is."""
    if type(value) in (int, float, bool) or not hasattr(value, "item") or getattr(value, "shape", None) != ():
        return value
    if getattr(value, "is_meta", False):
        return value
    number = value.item()
    return number if isinstance(number, (int, float)) else value
