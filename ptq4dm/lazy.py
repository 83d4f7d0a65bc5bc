"""Late imports: a package that imports each of its names when somebody first asks for it (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module


def lazy_names(
    package: str, homes: dict[str, str], rooms: tuple[str, ...] = (), first: Callable[[], None] = lambda: None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for the __init__ of a package.

    homes: public name -> "module:attribute", the module below the package. ":attribute" may be left out where the
        attribute has the public name.
    rooms: folders and files of the package that can be asked for by name, too.
    first: called before a module of `homes` is imported.

    `__getattr__` raises AttributeError for any other name, as Python wants it.
    """

    def get(name: str) -> object:
        if name in rooms:
            return import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        first()
        module, _, attribute = homes[name].partition(":")
        value = getattr(import_module(f"{package}.{module}"), attribute or name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *rooms})

    return get, names
