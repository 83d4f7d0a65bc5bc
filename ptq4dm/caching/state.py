"""The state of modules: equal to another one only if the modules still compute the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

PLAIN = (bool, int, float, str, complex, bytes, type(None), type, torch.dtype, torch.device)
# Hooks of nn.Module, and what only saving and loading look at. Modules with hooks are not asked for their state.
OTHERS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}


class State:
    """What decides on the results of modules and of those in them: classes, tensors, and all other attributes.

    A tensor is the same if it is the same object, in the same memory, and was not written into. Of attributes,
    numbers and texts are compared, in lists and dicts too (so a LoRA adapter's name, scale and whether it is merged
    count); of all else it is asked whether it is the same object.

    Two things cannot be seen: writing through `tensor.data`, which torch does not count, and a change inside of an
    object of a class of its own. Tensors made under `torch.inference_mode` keep no count at all: they never have the
    state that they had before.

    own: modules of which the modules in them do not count, only which these are.
    more: further values that decide, to compare. A state is one of now, made in microseconds; it is only kept once
    `held` was called.
    """

    def __init__(self, modules: Iterable[nn.Module | None], *more: Any, own: Iterable[nn.Module] = ()) -> None:
        self.facts: list[Any] = list(more)
        self.objects: list[Any] = []
        for module in modules:
            if module is not None:
                self._module(module)
        for module in own:
            self._own(module)

    def held(self) -> State:
        """Itself, and what is compared by its address keeps its address from now on: objects by being held, and the
        memory of tensors by a weak reference, which does not hold the bytes."""
        tensors = [one for one in self.objects if isinstance(one, Tensor)]
        self.objects += [StorageWeakRef(one.untyped_storage()) for one in tensors]
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self.facts == other.facts

    __hash__ = None  # type: ignore[assignment]

    def _module(self, module: nn.Module) -> None:
        self._own(module)
        for child in module._modules.values():
            if child is not None:
                self._module(child)

    def _own(self, module: nn.Module) -> None:
        self.facts.append(type(module))
        for name, value in vars(module).items():
            if name not in OTHERS:
                self.facts.append(name)
                self._add(value)

    def _add(self, value: Any) -> None:
        if isinstance(value, PLAIN):
            self.facts.append(value)
        elif isinstance(value, Tensor):
            self._same(value)
            if value.is_inference():
                self.facts.append(object())  # equal to no other
            else:
                strides = value.stride() if value.layout == torch.strided else None
                self.facts += value.shape, strides, value.storage_offset(), value.dtype, value.device
                self.facts += value.untyped_storage()._cdata, value._version
        elif isinstance(value, dict):
            self.facts.append(len(value))
            for key, one in value.items():
                self._add(key)
                self._add(one)
        elif isinstance(value, (list, tuple)):
            self.facts.append(len(value))
            for one in value:
                self._add(one)
        elif isinstance(value, (set, frozenset)):
            self.facts.append(sorted(map(repr, value)))
        else:
            self._same(value)

    def _same(self, value: object) -> None:
        self.facts.append(id(value))
        self.objects.append(value)
