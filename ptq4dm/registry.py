"""Registries: a name and what stands for it. Who writes a new member adds one file; nothing else names it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from .errors import UserError

LATE: list[str] = []
"""Modules that register members when they are imported, at the first look into a late registry; the top of the house
appends them."""


class Registry(dict):
    """name -> member, of one kind ("rounding", "objective", ...).

    late: members may be in LATE: they are there for everybody who looks.
    """

    def __init__(self, kind: str, late: bool = False):
        super().__init__()
        self.kind, self.late = kind, late

    def add(self, name: str, member: Any) -> Any:
        """Register a member and return it. Raises ValueError where another has the name."""
        known = dict.get(self, name)
        if known is not None and _origin(known) != _origin(member):
            raise ValueError(f"{self.kind} '{name}' is registered already, by {_origin(known)}.")
        self[name] = member
        return member

    def find(self, name: str) -> Any:
        """Return the member of this name. Raises UserError that lists the names there are."""
        if not isinstance(name, str) or name not in self:
            raise UserError(f"{self.kind} {name!r} is unknown; choose from {', '.join(self.offered())}.")
        return self[name]

    def offered(self) -> list[str]:
        """The names of members that somebody may ask for."""
        return sorted(name for name, member in self.items() if not getattr(member, "loaded_only", False))


def _complete(name: str) -> Callable:
    """A method of dict that sees the late members, too."""

    def read(self: Registry, *args: Any) -> Any:
        if self.late and not (name in ("__contains__", "__getitem__", "get") and dict.__contains__(self, args[0])):
            load_late()
        return getattr(dict, name)(self, *args)

    return read


for _name in ("__contains__", "__getitem__", "__iter__", "__len__", "get", "items", "keys", "values"):
    setattr(Registry, _name, _complete(_name))


def load_late() -> None:
    """Import what is in LATE; after the first time, nothing."""
    while LATE:
        module = LATE.pop(0)
        try:
            importlib.import_module(module)
        except BaseException:
            LATE.insert(0, module)  # who looks again is told again
            raise


def load_members(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each can register itself. For the last line of its __init__."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _origin(member: Any) -> str:
    """Module and name of a member: the same when a file is loaded anew."""
    kind = member if hasattr(member, "__qualname__") else type(member)
    return f"{kind.__module__}.{kind.__qualname__}"
