"""Values that come from Python, looked at by their annotations: a wrong one is a sentence, not a traceback.

    check_fields(config, "SVDQuantConfig")     SVDQuantConfig: rank must be a whole number from 0 to 1024; got '8'.
    @checked                                   the same for the arguments of a function

A bool is no number here and a text is no list; an int is a float, too. NumPy's numbers, and tensors that hold one
number, are taken for what they are. NaN and infinity are refused unless a field says otherwise (`limits`).
"""

from __future__ import annotations

import collections.abc as abc
import functools
import inspect
import itertools
import math
import numbers
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from .errors import UserError

_Function = TypeVar("_Function", bound=Callable)

LIST_KINDS = (list, tuple, set, frozenset, abc.Sequence, abc.Collection, abc.Iterable)
PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "True or False"}
MOST = 2**63 - 1  # what a number of 64 bits holds
MOST_SEEDS = 10_000_000  # in one call


# ------------------------------------------------------------------------------------------- fields and arguments


def limits(low: float | None = None, high: float | None = None, finite: bool = True) -> dict[str, Any]:
    """Metadata of a field (or `checked`'s of an argument): the least and the largest value, and no NaN or infinity.

    A number on its own, each number of a list or a tuple, and each value of a dict are held to them.
    """
    return {"low": low, "high": high, "finite": finite}


def wrong_fields(instance: Any) -> list[str]:
    """What is wrong with the fields of a dataclass, by annotations and `limits`: "rank must be ...; got ..."."""
    kinds = annotations_of(type(instance))
    found = []
    for item in fields(instance):
        value = getattr(instance, item.name)
        if says := _complaint(value, kinds[item.name], item.metadata):
            found.append(f"{item.name} {says}; got {shown(value)}")
    return found


def check_fields(instance: Any, what: str) -> None:
    """Raises UserError for the first field of a dataclass that is not as its annotation and its `limits` say.

    Numbers of NumPy and tensors of one number become Python's, so that the fields are plain JSON values.
    """
    for name, kind in annotations_of(type(instance)).items():
        value = getattr(instance, name)
        if (number := plain_number(value)) is not value and _complaint(number, kind, {}) is None:
            object.__setattr__(instance, name, number)
    for wrong in wrong_fields(instance):
        raise UserError(f"{what}: {wrong}.")


def checked(function: _Function) -> _Function:
    """Decorator: arguments that are not as the annotations say are a UserError.

    An annotation that has no value at run time (imported for editors only) is not looked at.
    """
    signature = inspect.signature(function)
    walked = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, parameter in signature.parameters.items() if parameter.kind not in walked]
    kinds = functools.cache(lambda: annotations_of(function))  # late: names may be defined below the function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # a missing or unknown argument is Python's to report
        for name in named:
            if name in given and name in kinds():
                check(given[name], kinds()[name], f"{function.__qualname__}: {name}")
        return function(*args, **kwargs)

    return cast(_Function, call)


def check(value: Any, kind: Any, what: str, low: float | None = None, high: float | None = None) -> Any:
    """The value. Raises UserError "{what} must be ...; got ..." where it is not of this kind, or out of bounds."""
    if says := _complaint(value, kind, limits(low, high)):
        raise UserError(f"{what} {says}; got {shown(value)}.")
    return value


# ------------------------------------------------------------------------------------------------------- numbers


def whole(value: Any, what: str, low: int = 0, high: int = MOST) -> int:
    """The whole number that a value is: an int, NumPy's, or a tensor's. Raises UserError for all else."""
    return int(plain_number(check(value, int, what, low, high)))


def seeds_of(seeds: Any) -> list[int]:
    """Seeds as a list of ints from 0 to 2^63 - 1, from any iterable of whole numbers, a tensor [N] or an array.

    Raises UserError where one is none, or there are none at all.
    """
    empty = getattr(seeds, "is_meta", False)  # a tensor without values
    if hasattr(seeds, "tolist") and getattr(seeds, "ndim", 0) == 1 and not empty:
        seeds = seeds.tolist()
    if empty or isinstance(seeds, (str, bytes, Mapping)) or not isinstance(seeds, Iterable) or _scalar(seeds):
        raise UserError(f"seeds must be a list of whole numbers; got {shown(seeds)}.")
    try:
        many = len(seeds) > MOST_SEEDS  # type: ignore[arg-type]  # a generator has no length: it is counted below
    except (TypeError, OverflowError) as error:
        many = isinstance(error, OverflowError)
    first = () if many else itertools.islice(seeds, MOST_SEEDS + 1)
    found = [whole(seed, "a seed") for seed in first]
    if many or len(found) > MOST_SEEDS:
        raise UserError(f"more than {MOST_SEEDS} seeds at once are too many; take them in several calls.")
    if not found:
        raise UserError("at least one seed is needed, and there is none.")
    return found


def check_seeds(first: int, count: int, what: str = "seed") -> None:
    """Raises UserError unless first, ..., first + count - 1 are seeds: torch's generators take 0 to 2^63 - 1."""
    if first + count - 1 > MOST:
        raise UserError(
            f"{what} {first} leaves no room for {count} seeds below 2^63 = {MOST + 1}; choose a smaller one."
        )


def plain_number(value: Any) -> Any:
    """A number of NumPy, or a tensor of no dimensions, as Python's int, float or bool; anything else as it is."""
    if type(value) in (int, float, bool) or not hasattr(value, "item") or getattr(value, "shape", None) != ():
        return value
    if getattr(value, "is_meta", False):
        return value
    number = value.item()
    return number if isinstance(number, (int, float)) else value


# --------------------------------------------------------------------------------------------------- annotations


def _complaint(value: Any, kind: Any, limited: Mapping[str, Any]) -> str | None:
    """What a value must be ("must be a number"), where it is not; None where all is well."""
    low, high = limited.get("low"), limited.get("high")
    if not _is(value, kind):
        return "must be " + _described(kind) + _bounds(low, high)
    if isinstance(value, (str, os.PathLike)) and os.PathLike in get_args(kind) and not _can_be_a_path(value):
        return "must be a path that a file system can have"
    finite = limited.get("finite", True)
    for number in _numbers(value) if _speaks_of_numbers(kind) else ():
        if isinstance(number, int):
            if abs(number) > MOST and high is None and not isinstance(value, (list, tuple)):
                return "must be " + _described(kind) + _bounds(-MOST if low is None else low, MOST)
        elif finite and not math.isfinite(number):
            return f"must be {_described(kind)}{_bounds(low, high)}, not NaN or infinity"
        if low is not None and not number >= low and (high is None or high >= 10_000) and number is value:
            return f"must be at least {low:g}" if low else "must not be negative"
        if (low is not None and not number >= low) or (high is not None and not number <= high):
            return "must be " + _described(kind) + _bounds(low, high)
    return None


def _speaks_of_numbers(kind: Any) -> bool:
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


def _is(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, (TypeVar, str)):
        return True
    if kind is None or kind is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is typing.Annotated:
        return _is(value, inner[0])
    if kind in (bool, int, float):
        return _is_number(value, kind)
    kind = origin or kind
    if kind is type or kind is abc.Callable:
        return callable(value)
    if kind in LIST_KINDS:
        return _is_list(value, kind, inner)
    if kind in (dict, abc.Mapping, abc.MutableMapping):
        pairs = inner or (Any, Any)
        return isinstance(value, kind) and all(_is(k, pairs[0]) and _is(v, pairs[1]) for k, v in value.items())
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    value = plain_number(value)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int if kind is int else (int, float))


def _is_list(value: Any, kind: Any, inner: tuple) -> bool:
    if isinstance(value, (str, bytes, Mapping)) or _scalar(value):
        return False
    if kind in (list, tuple):  # a list in place of a tuple is what JSON makes of it
        kind = (list, tuple)
    if not isinstance(value, kind):  # arrays and tensors are iterable, and nothing more
        return False
    if kind in (abc.Iterable,) or not inner:
        return True
    if get_origin(inner) is None and len(inner) > 1 and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(_is(one, its) for one, its in zip(value, inner, strict=True))
    return all(_is(one, inner[0]) for one in value)


def _scalar(value: Any) -> bool:
    """Whether a value looks like something to walk through, and has no dimension (a tensor or an array of one)."""
    return getattr(value, "shape", None) == ()


def _described(kind: Any) -> str:
    """What an annotation asks for, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", os.PathLike: "a path"}
    if kind in words:
        return words[kind]
    if kind is None or kind is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        found = list(dict.fromkeys(_described(one) for one in inner))
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
    return PLURALS.get(kind) or f"values that are each {_described(kind)}"


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}" if abs(high) < 1e6 else f" from {low:g} to {high}"
    return f" of {low:g} or more" if low is not None else "" if high is None else f" of at most {high}"


def shown(value: Any) -> str:
    """A few words on a value that came in place of another; never fails, however odd it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) > 1 << 200:
        return "a number of very many digits"
    if value is None or isinstance(value, (str, bytes, numbers.Number)):
        return textwrap.shorten(repr(value), 60, placeholder=" ...")[:64]
    if isinstance(value, (list, tuple)) and 0 < len(value) < 5:
        ends = "[]" if isinstance(value, list) else "()"
        inside = [shown(one) if not isinstance(one, (list, tuple)) else type(one).__name__ for one in value]
        return f"{ends[0]}{', '.join(inside)}{ends[1]}"
    kind = value if isinstance(value, type) else type(value)
    return f"the class {kind.__name__}" if kind is value else f"a {kind.__name__}"


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
