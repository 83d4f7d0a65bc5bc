"""Options of a recipe: dataclass fields that say on the command line, too, what they are for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    parse: Callable[[str], Any] | None = None,
    flag: bool = True,
) -> Any:
    """Return a dataclass field whose metadata makes it an option of `ptq4dm quantize`.

    default: the value where nothing is said; a list or a dict is made anew for each recipe.
    help: what the option does, in a few words.
    choices: the values that there are; () where they cannot be listed.
    parse: from the text of the command line to a value; left out, the type of the default does it.
    flag: False for what has no place on a command line (a dict of roles, a plan).
    """
    metadata = {"help": help, "choices": tuple(choices), "parse": parse, "flag": flag}
    if isinstance(default, (list, dict, set)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def number_or_word(text: str) -> float | str:
    """ "0.5" -> 0.5; anything that is no number stays as it is."""
    try:
        return float(text)
    except ValueError:
        return text
