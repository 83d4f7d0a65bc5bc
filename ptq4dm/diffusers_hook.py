"""How diffusers learns of ptq4dm, whichever of the two is imported first, without importing it or torch from here.

diffusers has no entry point for others: it knows quantizers from two tables, pipelines as names of its own, and takes
the class of a saved scheduler only from a module that has been imported. As soon as the module that holds its tables
has run, ours are in them; as soon as it can load pipelines, it can load ours with our schedulers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

PACKAGE = __name__.rpartition(".")[0]
SAVED = ("samplers.one_step", "samplers.deis", "samplers.ddim")  # model_index.json names them: they cannot move
PIPELINES = ("pipelines.pixel_dit",)  # puts its class among the names of diffusers


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once the module `name` has run: now, if it has."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch:
    """A finder that finds one module as the others do, and has something done after it has run."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec


class _Later(type):
    """A class that stands for the one of its name in our bridge: diffusers may be half imported when it needs one."""

    def _real(cls):
        return getattr(import_module(f"{PACKAGE}.quantization.diffusers_bridge"), cls.__name__)

    def __call__(cls, *args, **kwargs):
        return cls._real()(*args, **kwargs)

    def __instancecheck__(cls, instance):
        return isinstance(instance, cls._real())

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(cls._real(), name)


def _fill_tables() -> None:
    auto = sys.modules["diffusers.quantizers.auto"]
    auto.AUTO_QUANTIZER_MAPPING.setdefault("ptq4dm", _Later("PTQ4DMQuantizer", (), {}))
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("ptq4dm", _Later("QuantConfig", (), {}))


def _import_saved_classes() -> None:
    for name in (*SAVED, *PIPELINES):
        import_module(f"{PACKAGE}.{name}")


def install() -> None:
    """Register with diffusers, or see to it that it happens when diffusers is imported."""
    when_imported("diffusers.quantizers.auto", _fill_tables)
    when_imported("diffusers.pipelines.pipeline_utils", _import_saved_classes)
