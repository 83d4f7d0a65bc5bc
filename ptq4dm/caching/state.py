"""The state of modules: equal to another one only if the modules still compute the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)
# Hooks of nn.Module, and what only saving and loading look at. Modules with hooks are not asked for their state.
OTHERS = ("_backward_", "_forward_", "_state_dict_", "_load_state_dict_", "_non_persistent_", "_is_full_backward")


def state_of(modules: Iterable[nn.Module | None]) -> list[Any]:
    """What decides on the results of modules and of those in them: classes, tensors, and all other attributes.

    A tensor is the same if it is the same object, in the same memory, and was not written into. Of attributes,
    numbers and texts are compared, in lists and dicts too (so a LoRA adapter's name, scale and whether it is merged
    count); of all else it is asked whether it is the same object.

    Two things cannot be seen: writing through `tensor.data`, which torch does not count, and a change inside of an
    object of a class of its own. Tensors made under `torch.inference_mode` keep no count at all: they never have the
    state that they had before.
    """
    return [
        (type(part), [(name, _frozen(value)) for name, value in vars(part).items() if not name.startswith(OTHERS)])
        for module in modules
        if module is not None
        for part in module.modules()
    ]


class _Same:
    """Equal to one that holds the same object. It keeps the object, so that no other can get its place in memory."""

    __slots__ = ("one",)

    def __init__(self, one: object) -> None:
        self.one = one

    def __eq__(self, other: object) -> bool:
        return type(other) is _Same and other.one is self.one

    __hash__ = None  # type: ignore[assignment]


def _frozen(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return _Same(value), _memory(value)
    if isinstance(value, dict):
        return [(_frozen(key), _frozen(one)) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [_frozen(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    return _Same(value)


def _memory(tensor: Tensor) -> Any:
    """Where a tensor lies and how often it was written into. The storage is held weakly: not its bytes, but no other
    can get its address."""
    if tensor.is_inference():
        return _Same(object())
    return _Storage(tensor), tensor.storage_offset(), tensor._version, tensor.dtype, tensor.device


class _Storage:
    """Equal to one of the same storage."""

    __slots__ = ("reference",)

    def __init__(self, tensor: Tensor) -> None:
        self.reference = StorageWeakRef(tensor.untyped_storage())

    def __eq__(self, other: object) -> bool:
        return type(other) is _Storage and other.reference.cdata == self.reference.cdata

    __hash__ = None  # type: ignore[assignment]
