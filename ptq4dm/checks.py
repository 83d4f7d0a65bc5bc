"""Values that come from Python, looked at by their annotations: a wrong one is a sentence, not a traceback.

    check_fields(config, "SVDQuantConfig")     SVDQuantConfig: rank must be a whole number from 0 to 1024; got '8'.
    @checked                                   the same for the arguments of a function

A bool is no number here and a text is no list; an int is a float, too. NumPy's numbers, and tensors that hold one
number, are taken for what they are. NaN and infinity are refused unless a field says otherwise (`limits`).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from .annotations import MOST, annotations_of, complaint, is_scalar, plain_number
from .errors import UserError, unknown_option

_Function = TypeVar("_Function", bound=Callable)
_Class = TypeVar("_Class", bound=type)

MOST_SEEDS = 10_000_000  # in one call


# ------------------------------------------------------------------------------------------- fields and arguments


def limits(low: float | None = None, high: float | None = None, finite: bool = True) -> dict[str, Any]:
    """Metadata of a field (or `checked`'s of an argument): the least and the largest value, and no NaN or infinity.

    A number on its own, each number of a list or a tuple, and each value of a dict are held to them.
    """
    return {"low": low, "high": high, "finite": finite}


def named_options(kind: _Class, holders: Callable[[str], Iterable[str]] = lambda name: ()) -> _Class:
    """Class decorator of a dataclass of options: one that it does not have is an `UnknownOption`.

    holders: name of an option -> what else to take, which has it.
    """
    made, known = kind.__init__, list(inspect.signature(kind).parameters)  # type: ignore[misc]

    @functools.wraps(made)
    def init(self: Any, *args: Any, **options: Any) -> None:
        if unknown := [name for name in options if name not in known]:
            raise unknown_option(kind.__name__, unknown, choices_of(kind), holders(unknown[0]))
        made(self, *args, **options)

    kind.__init__ = init  # type: ignore[misc]
    return kind


def choices_of(kind: type) -> list[str]:
    """Names of a dataclass's fields that are a user's to choose: all but those that a method has fixed."""
    return [item.name for item in fields(kind) if item.init and not item.metadata.get("fixed")]


def wrong_fields(instance: Any) -> list[str]:
    """What is wrong with the fields of a dataclass, by annotations, `limits`, choices: "rank must be ...; got 5"."""
    kinds = annotations_of(type(instance))
    found = []
    for item in fields(instance):
        value = getattr(instance, item.name)
        says, choices = complaint(value, kinds[item.name], item.metadata), item.metadata.get("choices")
        if not says and choices and value not in choices:
            says = f"must be one of {', '.join(str(one) for one in choices if one is not None)}"
            says += " or None" if None in choices else ""
        if says:
            found.append(f"{item.name} {says}; got {shown(value)}")
    return found


def check_types(instance: Any) -> None:
    """Raises ValueError for the first field of a dataclass, made from a file, that is not as its annotation says.

    It is strict: see `annotations`. The bounds of fields (`limits`) are not looked at.
    """
    for name, kind in annotations_of(type(instance)).items():
        if says := complaint(getattr(instance, name), kind, plain=True):
            raise ValueError(f"{name} {says}; got {shown(getattr(instance, name))}")


def check_fields(instance: Any, what: str) -> None:
    """Raises UserError for the first field of a dataclass that is not as its annotation, its `limits` and its choices
    say.

    Numbers of NumPy and tensors of one number become Python's, so that the fields are plain JSON values.
    """
    for name, kind in annotations_of(type(instance)).items():
        value = getattr(instance, name)
        if (number := plain_number(value)) is not value and complaint(number, kind) is None:
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
    if says := complaint(value, kind, limits(low, high)):
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
    if empty or isinstance(seeds, (str, bytes, Mapping)) or not isinstance(seeds, Iterable) or is_scalar(seeds):
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


def shown(value: Any) -> str:
    """A few words on a value that came in place of another; never fails, however odd it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) > 1 << 200:
        return "a number of very many digits"
    if value is None or isinstance(value, (str, bytes, numbers.Number)):
        return textwrap.shorten(repr(value), 60, placeholder=" ...")[:64]
    flat = isinstance(value, (list, tuple)) and not any(isinstance(one, (list, tuple)) for one in value)
    if not (flat and len(value) < 5) and (odd := _unbounded(value)) is not None:  # which else would not be seen
        return f"a {type(value).__name__} with {odd}"
    if isinstance(value, (list, tuple)) and 0 < len(value) < 5:
        ends = "[]" if isinstance(value, list) else "()"
        inside = [shown(one) if not isinstance(one, (list, tuple)) else type(one).__name__ for one in value]
        return f"{ends[0]}{', '.join(inside)}{ends[1]}"
    if isinstance(value, (list, tuple, dict)) and not value:
        return f"an empty {type(value).__name__}"
    kind = value if isinstance(value, type) else type(value)
    return f"the class {kind.__name__}" if kind is value else f"a {kind.__name__}"


def _unbounded(value: Any) -> float | None:
    """The first NaN or infinity in a list, or in lists of it; None where there is none."""
    if isinstance(value, (list, tuple)):
        for one in value:
            found = one if isinstance(one, float) and not math.isfinite(one) else _unbounded(one)
            if found is not None:
                return found
    return None
