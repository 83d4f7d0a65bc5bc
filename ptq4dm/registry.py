"""Registries: a name and what stands for it. Who writes a new member adds one file; nothing else names it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from .errors import UserError


class Registry(dict):
    """name -> member, of one kind ("rounding", "objective", ...)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def add(self, name: str, member: Any) -> Any:
        """Register a member and return it. Raises ValueError where another has the name."""
        known = self.get(name)
        if known is not None and _origin(known) != _origin(member):
            raise ValueError(f"{self.kind} '{name}' is registered already, by {_origin(known)}.")
        self[name] = member
        return member

    def find(self, name: str) -> Any:
        """Return the member of this name. Raises UserError that lists the names there are."""
        if not isinstance(name, str) or name not in self:
            load_late()
        if not isinstance(name, str) or name not in self:
            raise UserError(f"{self.kind} {name!r} is unknown; choose from {', '.join(sorted(self))}.")
        return self[name]

    def adding(self, name: str) -> Callable:
        """Return a decorator that registers what it stands above."""
        return lambda member: self.add(name, member)


def _origin(member: Any) -> str:
    """Module and name of a member: the same when a file is loaded anew."""
    return f"{getattr(member, '__module__', '')}.{getattr(member, '__qualname__', type(member).__qualname__)}"


LATE: list[str] = []
"""Packages whose members are imported when a name is not known yet; the top of the house appends them."""


def load_late() -> None:
    """Import what is in LATE, once."""
    while LATE:
        importlib.import_module(LATE.pop(0))


def load_members(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that each can register itself. For the last line of its __init__."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
