"""Options of a recipe: fields of a dataclass that are flags of the command line, too.

    rank: int = option(32, "of the low-rank branch")        --rank RANK   of the low-rank branch (32)

cli/flags.py reads the fields and makes the flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, Field, field, fields
from typing import Any

from .checks import limits


def option(
    default: Any,
    help: str = "",
    *,
    choices: Sequence[Any] = (),
    parse: Callable[[str], Any] | None = None,
    flag: bool = True,
    fixed: bool = False,
    low: float | None = None,
    high: float | None = None,
    finite: bool = True,
) -> Any:
    """Return a dataclass field whose metadata makes it an option of `ptq4dm quantize`.

    default: the value where the user says nothing. A list, a dict or a set is copied for each recipe.
    help: what the option does, in a few words; without it the field is no flag.
    choices: all values that are allowed; () where they cannot be listed.
    parse: a function from the text of the command line to a value. Without it the type of the default decides.
    fixed: True where a class that inherits an option has no choice in it: the default alone is taken, and no flag.
    flag: False for an option that has no place on a command line (a dict of roles, a plan).
    low, high, finite: the least and the largest number, and whether infinity is refused: see `checks.check_fields`.
    """
    metadata = {"help": help, "choices": tuple(choices), "parse": parse, "flag": flag and not fixed, "fixed": fixed}
    metadata |= limits(low, high, finite)
    if isinstance(default, (list, dict, set)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def has_option(kind: type, name: str) -> bool:
    """Whether a dataclass has an option of this name that is a user's to choose: none fixed, none without a help."""
    found = (item.metadata for item in fields(kind) if item.name == name)
    return any(facts.get("help") and not facts.get("fixed") for facts in found)


_said: ContextVar[frozenset[str]] = ContextVar("said", default=frozenset())


@contextmanager
def saying(names: Iterable[str]) -> Iterator[None]:
    """While a recipe is made of what a user wrote: the options that are named there, also with their defaults."""
    before = _said.set(frozenset(names))
    try:
        yield
    finally:
        _said.reset(before)


def is_given(instance: Any, name: str) -> bool:
    """Whether an option of a dataclass is given: it has another value than its default, or is `saying`'s.

    In Python a default that is given and one that is left out are the same.
    """
    field = next(item for item in fields(instance) if item.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return name in _said.get() or getattr(instance, name) != default


def no_choice(instance: Any) -> Field | None:
    """The first option that the class of a dataclass has fixed, and that is given; None for none."""
    own = (item for item in fields(instance) if item.metadata.get("fixed"))
    return next((item for item in own if is_given(instance, item.name)), None)


def whole_or_row(text: str) -> int | None:
    """Return the whole number that a text holds, and None, as Python says one scale an output, of "row"."""
    return None if text == "row" else int(text)


whole_or_row.__name__ = "group size"  # as argparse calls what it does not take


def number_or_word(text: str) -> float | str:
    """Return the number that a text holds ("0.5" -> 0.5), or the text where it holds none ("search")."""
    try:
        return float(text)
    except ValueError:
        return text
