"""How diffusers and transformers learn of ptq4dm, whichever is imported first. Nothing here imports them, or torch.

diffusers has no entry points for other libraries. It finds quantizers in two tables of its own, pipelines among its
own names, and the class of a saved scheduler only in a module that has been imported already. So we wait for two of
its modules: when the one with the tables has run, we put our quantizer into them; when the one that loads pipelines
has run, we import our pipelines and schedulers. transformers has the same two tables for text encoders.

peft asks a layer under an adapter for `qweight` where it means its weight: codes, for models that cast their inputs
to `layer.weight.dtype`. When it has run, it asks our layers for `weight`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

PACKAGE = __name__.rpartition(".")[0]
SAVED = ("samplers.one_step", "samplers.deis", "samplers.ddim")  # model_index.json names them: they cannot move
PIPELINES = ("pipelines.pixel_dit",)  # puts its class among the names of diffusers


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once, after the module `name` has run; at once, if it has run already."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch:
    """An import finder for one module: it asks the other finders, and calls `action` after the module has run."""

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
    """The type of a class that stands for the class of the same name in the file `home`, which it imports when it is
    used: when diffusers' tables are filled, diffusers is only half imported, and our bridge could not be."""

    home: str

    def _real(cls):
        return getattr(import_module(f"{PACKAGE}.quantization.{cls.home}"), cls.__name__)

    def __call__(cls, *args, **kwargs):
        return cls._real()(*args, **kwargs)

    def __instancecheck__(cls, instance):
        return isinstance(instance, cls._real())

    def __getattr__(cls, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(cls._real(), name)


def _fill_tables() -> None:
    _fill("diffusers.quantizers.auto", "PTQ4DMQuantizer", "diffusers_bridge")


def _fill_tables_of_transformers() -> None:
    _fill("transformers.quantizers.auto", "TransformersQuantizer", "transformers_bridge")


def _fill(tables: str, quantizer: str, home: str) -> None:
    auto = sys.modules[tables]
    auto.AUTO_QUANTIZER_MAPPING.setdefault("ptq4dm", _Later(quantizer, (), {"home": home}))
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("ptq4dm", _Later("QuantConfig", (), {"home": "recipe"}))


def _import_saved_classes() -> None:
    for name in (*SAVED, *PIPELINES):
        import_module(f"{PACKAGE}.{name}")


def _ask_for_weight() -> None:
    adapted = sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer
    theirs = adapted.weight

    def weight(self):
        layer = self.get_base_layer()
        return layer.weight if hasattr(layer, "dequantized_weight") else theirs.__get__(self)

    adapted.weight = property(weight)


def install() -> None:
    """Register with diffusers, transformers and peft: now, or when they are imported."""
    when_imported("diffusers.quantizers.auto", _fill_tables)
    when_imported("diffusers.pipelines.pipeline_utils", _import_saved_classes)
    when_imported("transformers.quantizers.auto", _fill_tables_of_transformers)
    when_imported("peft.tuners.tuners_utils", _ask_for_weight)
