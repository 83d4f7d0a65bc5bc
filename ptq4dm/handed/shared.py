"""Modules whose layers read one input: it is quantized once.

Query, key and value; the two halves of a gated feed-forward. Such a module's tensors go to its code as `Handed`, each
layer of the same key takes the codes that the first made, and whatever else the code does with them sees the tensors.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from .norms import hands_on
from .notes import Notes
from .value import Handed

_DERIVED: dict[type, type] = {}  # class of modules -> the class made of it


class Sharing:
    """What makes a module one that shares; its class is derived from this and the module's own."""

    sharing: Notes
    widths: tuple[int, ...]  # inputs of the layers that share


def sharing_class(kind: type) -> type:
    """The class for modules of this kind that share."""
    if kind not in _DERIVED:
        _DERIVED[kind] = _made(kind)
    return _DERIVED[kind]


def _made(kind: Any) -> type:
    plain = kind.forward  # torch.compile knows some of diffusers' classes by their names alone, not this

    @functools.wraps(plain)  # diffusers looks at the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training and self.sharing.open():
            args = tuple(_handed(self, slot, one) for slot, one in enumerate(args))
            kwargs = {name: _handed(self, name, one) for name, one in kwargs.items()}
        return plain(self, *args, **kwargs)

    return type(kind.__name__, (Sharing, kind), {"forward": forward, "__module__": kind.__module__})


def _handed(module: nn.Module, slot: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] not in module.widths:
        return value
    notes = module.sharing
    if not (value.is_floating_point() and notes.wants(slot) and hands_on(module, value)):
        return value
    return Handed(value, notes=notes, slot=slot)
