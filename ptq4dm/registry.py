"""Registries: names, and what each name stands for.

A new member (a method, a format, a rounder, ...) is one new file that registers itself. No other file names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from .errors import UserError

LATE: list[str] = []
"""Modules that are imported at the first look into a late registry, and register members then. ptq4dm/__init__.py
fills this list: this file lies below those modules and must not import them."""


class Registry(dict):
    """A dict: name -> member, all of one kind ("rounding", "objective", ...).

    kind: what members are called in messages.
    late: True where modules in LATE register members, too. They are imported before anybody reads the registry.
    """

    def __init__(self, kind: str, late: bool = False):
        super().__init__()
        self.kind, self.late = kind, late

    def add(self, name: str, member: Any) -> Any:
        """Register a member and return it. Raises ValueError where another member has the name."""
        known = dict.get(self, name)
        if known is not None and _origin(known) != _origin(member):
            raise ValueError(f"{self.kind} '{name}' is registered already, by {_origin(known)}.")
        self[name] = member
        return member

    def find(self, name: str) -> Any:
        """Return the member of this name. Raises UserError, which lists all names, where there is none."""
        if not isinstance(name, str) or name not in self:
            raise UserError(f"{self.kind} {name!r} is unknown; choose from {', '.join(self.offered())}.")
        return self[name]

    def offered(self) -> list[str]:
        """Names, sorted, of the members that a user may choose: those marked `loaded_only` are not among them."""
        return sorted(name for name, member in self.items() if not getattr(member, "loaded_only", False))


def _complete(name: str) -> Callable:
    """Return the dict's method of this name, made to see the late members, too."""

    def read(self: Registry, *args: Any) -> Any:
        if self.late and not (name in ("__contains__", "__getitem__", "get") and dict.__contains__(self, args[0])):
            load_late()
        return getattr(dict, name)(self, *args)

    return read


for _name in ("__contains__", "__getitem__", "__iter__", "__len__", "get", "items", "keys", "values"):
    setattr(Registry, _name, _complete(_name))


def load_late() -> None:
    """Import the modules in LATE, each once."""
    while LATE:
        module = LATE[0]
        importlib.import_module(module)  # where it fails, the next look does; another thread waits until it is whole
        with suppress(ValueError):  # that thread took it off
            LATE.remove(module)


def load_members(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each registers itself. Call it last in the package's __init__."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _origin(member: Any) -> str:
    """Module and name of a member; they stay the same when its file is loaded again."""
    kind = member if hasattr(member, "__qualname__") else type(member)
    return f"{kind.__module__}.{kind.__qualname__}"
