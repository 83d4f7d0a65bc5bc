"""Whether a model is still what it was when a graph of it was captured, asked at every call.

A graph has baked in what the call did: which memory it read, which way it went. `State` (caching/state.py) says what
decides on that, and takes milliseconds for a large model. So first it is asked whether anything was touched at all:
whether attributes of the modules are the same objects, tensors in the same memory and not written into. That is done
by loops in C, in some 20 nanoseconds an attribute. Only where something was touched, states are compared: an adapter
whose scale is set to what it was is the same.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..caching.processors import CachedText
from ..caching.state import PLAIN, State
from ..hooks import has_diffusers_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
CONTENTS = ("_modules", "_parameters", "_buffers")
version_of = operator.attrgetter("_version")


class Unwatched(ValueError):
    """A model of which it cannot be known whether it changes; the message says why."""


class Watch:
    """A model as it is now.

    Two things cannot be seen: tensors written through `.data`, which a graph reads as they are then, and a change
    deep inside of an object that is neither a module nor an attribute's own attribute.
    """

    def __init__(self, model: nn.Module, left: Iterable[str] = ()) -> None:
        """left: attributes of the model itself that say nothing about it. Raises Unwatched."""
        self.model, self.left = model, frozenset(left)
        self.state = self._state().held()
        self._look()

    def unchanged(self) -> bool:
        """Whether the model computes what it did."""
        if self.untouched():
            return True
        if self._state() != self.state:
            return False
        self._look()
        return True

    def _state(self) -> State:
        held = {name: vars(self.model).pop(name) for name in self.left if name in vars(self.model)}
        try:
            return State([self.model], *(_plain_part(vars(one)) for one in _parts(self.model)))
        finally:
            vars(self.model).update(held)

    def _look(self) -> None:
        modules = list(self.model.modules())
        inside = [
            value for module in modules for name, value in vars(module).items() if name[:1] != "_" and _shallow(value)
        ]
        self.dicts = [vars(module) for module in modules]
        self.dicts += [vars(module)[name] for module in modules for name in (*CONTENTS, *HOOKS)]
        self.dicts += [vars(one) for one in _parts(self.model)] + [one for one in inside if isinstance(one, dict)]
        self.lists = [one for one in inside if isinstance(one, list)]
        self.values = list(self._now())
        tensors = {id(value): value for value in self.values if isinstance(value, Tensor) and not value.is_meta}
        self.tensors = list(tensors.values())
        if any(map(Tensor.is_inference, self.tensors)):
            raise Unwatched("its tensors were made under torch.inference_mode, which does not count what is written")
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.versions = list(map(version_of, self.tensors))

    def untouched(self) -> bool:
        """Whether nothing was set, or written into, at all."""
        return self.in_place() and self.nothing_set()

    def nothing_set(self) -> bool:
        """Whether all attributes are the objects that they were."""
        return sum(map(len, chain(self.dicts, self.lists))) == len(self.values) and all(
            map(operator.is_, self._now(), self.values)
        )

    def in_place(self) -> bool:
        """Whether the tensors that the model had are where they were, and not written into: a quick look."""
        return (
            list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and list(map(version_of, self.tensors)) == self.versions
        )

    def _now(self) -> Iterable[Any]:
        return chain(chain.from_iterable(map(dict.values, self.dicts)), chain.from_iterable(self.lists))


def _shallow(value: Any) -> bool:
    """A container of an attribute, whose content is replaced in place: an adapter's scales, a processor's."""
    return isinstance(value, (dict, list)) and bool(value)


def _parts(model: nn.Module) -> list[Any]:
    """Objects that modules compute by, and that are no modules: attention's processors."""
    attributes = chain.from_iterable(vars(module).items() for module in model.modules())
    found = {
        id(value): value
        for name, value in attributes
        if name[:1] != "_" and name != "forward" and callable(value) and hasattr(value, "__dict__")
    }
    others = (nn.Module, type, types.FunctionType, types.MethodType)
    return [one for one in found.values() if not isinstance(one, others)]


def _plain_part(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, PLAIN)}


def hooked(model: nn.Module) -> str:
    """Why a call of a model must run as it is written; "" for no reason.

    Offloading, recorders and caches wait for calls of modules: what they do in Python a graph does not do again.
    """
    for name, module in model.named_modules():
        state = vars(module)
        where = f"'{name}'" if name else "the model itself"
        if any(state[kind] for kind in HOOKS):
            return f"{where} has a hook"
        if "_hf_hook" in state:
            return f"{where} is offloaded or moved by accelerate"
        if has_diffusers_hook(module):
            return f"{where} has a hook of diffusers (offloading, casting or a cache)"
        if module is not model and not _own_forward(module):
            return f"{where} computes by a function that was put into it"
        if isinstance(state.get("processor"), CachedText):
            return f"{where} looks at a text that is kept (cached_text)"
    return ""


def _own_forward(module: nn.Module) -> bool:
    """Whether a module computes by its class's `forward`, which diffusers leaves in it when a hook is taken off."""
    put, written = vars(module).get("forward"), type(module).forward
    return put is None or (getattr(put, "__self__", None) is module and getattr(put, "__func__", None) is written)


def watched() -> bool:
    """Whether somebody looks at the operations of torch in this thread, or wants them changed."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())
