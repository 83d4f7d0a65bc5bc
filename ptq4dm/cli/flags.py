"""Flags from the fields of dataclasses: a field whose metadata has a `help` is an option of the command line.

ptq4dm/options.py makes such fields. Nothing is left in the arguments of a flag that was not given: defaults are
the dataclass's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import Any


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def options_of(kind: type) -> dict[str, Field]:
    """The fields of a dataclass that are options, by name."""
    return {f.name: f for f in fields(kind) if f.metadata.get("help") and f.metadata.get("flag", True)}


def given(args, kind: type) -> dict[str, Any]:
    """What the user said of a dataclass's options."""
    return {name: getattr(args, name) for name in options_of(kind) if hasattr(args, name)}


def add_flags(group, kind: type, names: Collection[str] | None = None) -> None:
    """Add the options of one dataclass, or those of them that are named."""
    for name, field in options_of(kind).items():
        if names is None or name in names:
            choices = {"choices": field.metadata["choices"]} if field.metadata.get("choices") else {}
            _add(group, name, [field], _with(field.metadata["help"], _shown(field)), **choices)


def add_union(group, kinds: dict[str, type]) -> None:
    """Add the options of several dataclasses, one flag for each name; the help says whose it is.

    kinds: name -> dataclass. Whether a value is right for the chosen one, that one says itself.
    """
    owners: dict[str, dict[str, Field]] = {}
    for kind_name, kind in kinds.items():
        for name, field in options_of(kind).items():
            owners.setdefault(name, {})[kind_name] = field
    for name, found in owners.items():
        _add(group, name, list(found.values()), _union_help(found, everyone=len(found) == len(kinds)))


def _add(group, name: str, found: list[Field], text: str, **more) -> None:
    defaults = [_default(field) for field in found]
    switches = [_is_switch(field) for field in found]
    if all(switches):  # with a --no-... where "no" is not what is done without it
        more["action"] = "store_true" if all(one is False for one in defaults) else argparse.BooleanOptionalAction
    else:
        parsers = [_parser(field) for field, switch in zip(found, switches, strict=True) if not switch]
        more["type"] = _first_that_takes(sorted(set(parsers), key=_strictness))
        if any(isinstance(default, (tuple, list)) for default in defaults):
            more |= {"nargs": "+", "metavar": "NAME" if more["type"] is str else "N"}
        elif any(switches):  # of one method a switch, of another a value
            more |= {"nargs": "?", "const": True}
    group.add_argument(flag_of(name), dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **more)


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _is_switch(field: Field) -> bool:
    """Whether a field is yes or no; one whose default is None decides by other options."""
    return isinstance(_default(field), bool) or str(field.type) == "bool | None"


def _parser(field: Field):
    """From the text of one value to the value."""
    if field.metadata.get("parse"):
        return field.metadata["parse"]
    default = _default(field)
    if isinstance(default, (tuple, list)):
        return type(default[0]) if default else str
    if default is not None:
        return type(default)
    words = str(field.type).replace("|", " ").split()
    return int if "int" in words else float if "float" in words else str


def _strictness(parser) -> int:
    return {int: 0, float: 1, str: 3}.get(parser, 2)


def _first_that_takes(parsers: list):
    """One parser for methods that read a value each in its own way."""
    if len(parsers) == 1:
        return parsers[0]

    def parse(text: str):
        for parser in parsers[:-1]:
            try:
                return parser(text)
            except ValueError:
                continue
        return parsers[-1](text)

    parse.__name__ = parsers[-1].__name__
    return parse


# ------------------------------------------------------------------------------------------------------ the help


def _shown(field: Field) -> str:
    """The default, as a user would write it; "" where it says nothing."""
    default = _default(field)
    if isinstance(default, bool) or default in (None, (), [], {}):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _with(text: str, bracket: str) -> str:
    return f"{text} ({bracket})" if bracket else text


def _told(field: Field) -> str:
    """What an option does, and what there is to choose from."""
    text = field.metadata["help"]
    choices = [str(choice) for choice in field.metadata.get("choices") or () if choice is not None]
    if all(choice in text for choice in choices):
        return text
    return f"{text}: {' or '.join([', '.join(choices[:-1]), choices[-1]] if choices[1:] else choices)}"


def _union_help(found: dict[str, Field], everyone: bool) -> str:
    """ "number format: int8 or fp8 (this, that: int8); format of inputs (another: int4)"."""
    said: dict[str, dict[str, list[str]]] = {}
    for kind, field in found.items():
        said.setdefault(_told(field), {}).setdefault(_shown(field), []).append(kind)
    parts = []
    for text, defaults in said.items():
        if everyone and len(said) == len(defaults) == 1:
            bracket = next(iter(defaults))
        else:
            named = {", ".join(kinds): shown for shown, kinds in defaults.items()}
            bracket = "; ".join(f"{kinds}: {shown}" if shown else kinds for kinds, shown in named.items())
        parts.append(_with(text, bracket))
    return "; ".join(parts)
