"""Finding what quantized layers may read, and modules whose layers share an input, by a model's structure.

    norm       its width is the number of inputs of layers in the same block that take codes
    gate       as a norm
    sharing    two or more layers of its own would make the same codes of one input

A block is the smallest module around a norm or a gate, below the model itself, that has such layers. Which of them
really read it is seen at the first call (notes.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .gates import GATES, gated_width
from .norms import NORMS, width
from .notes import Notes
from .shared import Sharing, sharing_class

MADE = NORMS | GATES  # plain class -> the one that hands on
NORM = "quantized with what reads it"
SHARED = "its input quantized once for the layers that share it"


def hand_over(model: nn.Module, prefix: str, wholes: Collection[str], report: Any) -> None:
    """Let the norms of a model hand on what they read, and modules share codes.

    wholes: names of modules that are fused as a whole: what is inside of them stays. report: a FuseReport.
    """
    modules = dict(model.named_modules())
    layers = {name: one for name, one in modules.items() if isinstance(one, nn.Linear) and _takes_codes(one)}
    for name, module in modules.items():
        if not name or any(name == one or name.startswith(f"{one}.") for one in wholes):
            continue
        kind = type(module)
        if hands_over(module):
            report.leave(f"{prefix}{name}", kind.__mro__[1].__name__, "it is fused already")
        elif kind in MADE:
            inputs = width(module) if kind in NORMS else gated_width(module)
            notes = _read(name, inputs, modules, layers) if inputs or kind in GATES else None
            if notes:
                module.notes = notes
                module.__class__ = MADE[kind]
                report.hand(f"{prefix}{name}", f"{kind.__name__}, {NORM}", notes)
        elif shared := _shared(module):
            module.sharing = Notes(2, (), {layer: (layer,) for layer in shared})
            module.widths = tuple({layer.in_features for layer in shared})
            module.__class__ = sharing_class(kind)
            report.hand(f"{prefix}{name}", f"{kind.__name__}, {SHARED}", module.sharing)


def hands_over(module: nn.Module) -> bool:
    """Whether `hand_over` has changed a module."""
    return type(module) in MADE.values() or issubclass(type(module), Sharing)


def take_back(model: nn.Module) -> None:
    """Undo `hand_over`."""
    back = {kind: plain for plain, kind in MADE.items()}
    for module in model.modules():
        kind = type(module)
        if kind in back:
            del module.notes
            module.__class__ = back[kind]
        elif issubclass(kind, Sharing):
            del module.sharing, module.widths
            module.__class__ = kind.__mro__[2]


def _takes_codes(layer: Any) -> bool:
    return hasattr(layer, "codes_key") and layer.codes_key() is not None


def _read(name: str, inputs: int | None, modules: dict[str, nn.Module], layers: dict[str, Any]) -> Notes | None:
    """Notes of a module with the layers of so many inputs, or any, that may read it; None where there are none."""
    own, block = f"{name}.", name
    while block := block.rpartition(".")[0]:
        around = [one for one in layers if one.startswith(f"{block}.") and not one.startswith(own)]
        readers = [one for one in around if inputs in (None, layers[one].in_features)]
        if readers:
            paths = {layers[one]: _below(one, block, modules) for one in readers}
            return Notes(1, _below(name, block, modules), paths)
    return None


def _below(name: str, block: str, modules: dict[str, nn.Module]) -> tuple[nn.Module, ...]:
    """A module and those around it, below a block."""
    found = []
    while name != block:
        found.append(modules[name])
        name = name.rpartition(".")[0]
    return tuple(found)


def _shared(module: nn.Module) -> list[Any]:
    """A module's own layers that have another of the same inputs and key."""
    own = [layer for layer in module.children() if isinstance(layer, nn.Linear) and _takes_codes(layer)]

    def fits(one: Any, other: Any) -> bool:
        mine, its = one.codes_key(), other.codes_key()
        same = mine is its or (isinstance(mine, tuple) and mine == its)
        return one is not other and same and one.in_features == other.in_features

    return [one for one in own if any(fits(one, other) for other in own)]
