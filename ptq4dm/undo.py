"""A change of models that is made whole or not at all, whatever is raised in its middle."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from .interrupts import Gate, one_interrupt

Result = TypeVar("Result")


def whole_or_not(objects: Iterable[Any], change: Callable[[Gate], Result], *, values: bool = False) -> Result:
    """change(gate), and where it fails or is interrupted, the objects (models, or whatever has attributes) as they
    were.

    An interrupt is let through once, as long as the gate is open: the change shuts it where it begins to put in what
    it made.

    values: keep copies of weights and buffers as well, for a change that writes into them.
    """
    with one_interrupt() as gate:
        before, gradients = [_State(one, values) for one in objects], torch.is_grad_enabled()
        try:
            result = change(gate)
            gate.open = False
            return result
        except BaseException:
            gate.open = False
            torch.set_grad_enabled(gradients)  # torch.no_grad's own end can be cut in two
            for state in before:
                state.restore()
            raise


class _State:
    """What an object is: its class and attributes; of a model, those of all its modules."""

    def __init__(self, one: Any, values: bool) -> None:
        modules = list(one.modules()) if isinstance(one, nn.Module) else [one]
        self.objects = [(part, type(part), dict(vars(part))) for part in modules]
        held = {id(value): value for _, _, attributes in self.objects for value in attributes.values()}
        self.objects += [(value, type(value), dict(vars(value))) for value in held.values() if _is_record(value)]
        self.contents = [(value, _copied(value)) for value in held.values() if isinstance(value, (dict, list, set))]
        self.parameters: list[tuple] = []
        self.values: list[tuple] = []
        if isinstance(one, nn.Module):
            self.parameters = [(p, p.requires_grad, p.grad) for p in one.parameters()]
            tensors = [*one.parameters(), *one.buffers()] if values else []
            self.values = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]

    @torch.no_grad()
    def restore(self) -> None:
        for part, kind, attributes in self.objects:
            if type(part) is not kind:
                object.__setattr__(part, "__class__", kind)
            now = vars(part)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update(attributes)
        for value, content in self.contents:
            _refill(value, content)
        for parameter, requires_grad, grad in self.parameters:
            parameter.requires_grad, parameter.grad = requires_grad, grad
        for tensor, value in self.values:
            tensor.copy_(value)


def _is_record(value: Any) -> bool:
    """A layer's plan, say, or a config, whose entries are attributes, too."""
    return (dataclasses.is_dataclass(value) or isinstance(value, dict)) and bool(getattr(value, "__dict__", None))


def _copied(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _refill(value: Any, content: list) -> None:
    """A container with what it held; also one that its class calls frozen."""
    if isinstance(value, dict):
        kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        kind.clear(value)
        for key, item in content:
            kind.__setitem__(value, key, item)
    elif isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)
