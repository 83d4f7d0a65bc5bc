"""Modules that are imported at their first use: they need Triton, which takes time to import or is not there.

    if TYPE_CHECKING:
        from . import product
    else:
        late(globals(), "product")

The import is for readers, editors and checkers of types. From its first use on the name is the module's: it costs no
call anything, where an import statement inside a function would take 2 us of each.
"""

from __future__ import annotations

import importlib


def late(names: dict, *modules: str, **renamed: str) -> None:
    """Let modules beside the one whose globals are `names` be imported when first used; renamed: name=module."""
    for name, module in {module: module for module in modules}.items() | renamed.items():
        names[name] = _Late(names, name, f"{names['__package__']}.{module}")


class _Late:
    """Stands for a module until something is asked of it, and then gives it its place."""

    def __init__(self, names: dict, name: str, module: str):
        self._place = names, name, module

    def __getattr__(self, attribute: str):
        names, name, module = self._place
        names[name] = importlib.import_module(module)
        return getattr(names[name], attribute)
