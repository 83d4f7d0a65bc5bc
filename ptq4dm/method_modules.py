"""Where methods are: their modules are imported when somebody first looks for a method, not with `import ptq4dm`.

A file in ptq4dm/methods/ is found by being there. A method with a room of its own has a module `registered` that
imports all it registers: the method, its formats, fused passes, pictures.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

from .diffusers_hook import when_imported

PACKAGE = __name__.rpartition(".")[0]
REGISTRIES = (("quantization.recipe", "METHODS"), ("layers.plan", "PLANS"))  # module, name of a dict in it
FOLDER = f"{PACKAGE}.methods"
ROOMS = (f"{PACKAGE}.svdquant.registered",)

_lock = threading.RLock()
_begun = False


def load_methods() -> None:
    """Import every module that registers a method; after the first time, nothing."""
    global _begun
    with _lock:
        if _begun:
            return
        _begun = True
        try:
            for module in iter_modules(import_module(FOLDER).__path__, f"{FOLDER}."):
                import_module(module.name)
            for name in ROOMS:
                import_module(name)
        except BaseException:
            _begun = False  # who asks again is told again
            raise


def _reading(name: str):
    def read(self, *args):
        load_methods()
        return getattr(dict, name)(self, *args)

    return read


class Registry(dict):
    """A dict that methods write into, complete for everybody who looks into it."""

    __contains__, __getitem__ = _reading("__contains__"), _reading("__getitem__")
    __iter__, __len__, get = _reading("__iter__"), _reading("__len__"), _reading("get")
    items, keys, values = _reading("items"), _reading("keys"), _reading("values")


def _fill_on_demand(module: str, name: str) -> None:
    holder = sys.modules[module]
    setattr(holder, name, Registry(getattr(holder, name)))


def install() -> None:
    """Make registries import the methods on demand, once the modules that hold them are imported."""
    for module, name in REGISTRIES:
        when_imported(f"{PACKAGE}.{module}", partial(_fill_on_demand, f"{PACKAGE}.{module}", name))
