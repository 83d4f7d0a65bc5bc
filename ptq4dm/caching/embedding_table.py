"""Outputs of layers that are fed embeddings: kept for each time and condition that a model was called with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..errors import UserError
from ..hooks import hooked, unhooked
from .dependence import Dependence
from .state import PLAIN, State

MOST_STEPS = 256
"""Calls that are kept at a time; of more, those that were not used for longest are forgotten."""

Kept = tuple[Tensor, int]


class Table:
    """What one model's Linear layers gave, by the small arguments of its calls.

    steps: key of a call -> {layer: its outputs, in the order of its calls}. left: layers that look at the picture.
    made, reused: outputs of layers that were computed to be kept, and taken from here; uncached: calls of the model
        that nothing was kept of.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
        self.steps: OrderedDict[Any, dict[str, list[Kept]]] = OrderedDict()
        self.left: set[str] = set()
        self.served: set[str] = set()
        self.made = self.reused = self.uncached = 0
        self.most = 0
        self._fed: list[nn.Module] = []
        self._around: list[nn.Module] = []
        self._state: State | None = None
        self._watch: Dependence | None = None
        self._now: dict[str, list[Kept]] | None = None
        self._place: dict[str, int] = {}
        self._thread = threading.get_ident()

    @property
    def bytes(self) -> int:
        """Of the outputs that are kept now."""
        kept = [y for step in self.steps.values() for calls in step.values() for y, _ in calls]
        return sum(y.numel() * y.element_size() for y in kept)

    def clear(self) -> None:
        """Forget all outputs; counts, and which layers they were of, stay."""
        self.most = max(self.most, self.bytes)
        self.steps.clear()
        self._state = None

    def call(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of the model: by what is kept of one with the same times and conditions, or kept from now on.

        Raises UserError where gradients are wanted.
        """
        if torch.is_grad_enabled():
            raise UserError(
                "outputs of embedding layers are kept for sampling, and have no gradient: call the model under "
                "torch.no_grad()."
            )
        key, pictures = _split(args, kwargs)
        if key is None or threading.get_ident() != self._thread or not unhooked(*self.linears.values(), *self._fed):
            self.uncached += 1
            return forward(*args, **kwargs)
        if self._state is not None and self._state != self._state_now():
            self.clear()
        try:
            if key in self.steps:
                self.steps.move_to_end(key)
                self._now = self.steps[key]
                return forward(*args, **kwargs)
            return self._fill(key, pictures, forward, args, kwargs)
        finally:
            self._now, self._watch = None, None
            self._place.clear()

    def layer(self, name: str, forward: Callable, x: Tensor) -> Tensor:
        """A call of a layer, within one of the model."""
        if self._now is None or threading.get_ident() != self._thread:
            return forward(x)
        if self._watch is not None:
            y = forward(x)
            if self._watch.of(x):
                self.left.add(name)
            else:
                self._now.setdefault(name, []).append((y.clone() if y.is_inference() else y, _version(y)))
            return y
        place = self._place[name] = self._place.get(name, -1) + 1
        calls = self._now.get(name, [])
        if place >= len(calls):
            return forward(x)
        y, version = calls[place]
        if _version(y) != version:  # the model wrote into it
            y = forward(x)
            calls[place] = y, _version(y)
            return y
        self.reused += 1
        return y.clone() if y.is_inference() else y

    def _fill(self, key: Any, pictures: list[Tensor], forward: Callable, args: tuple, kwargs: dict) -> Any:
        if not unhooked(*(one for one in self.model.modules() if one is not self.model)):
            self.uncached += 1
            return forward(*args, **kwargs)
        step: dict[str, list[Kept]] = {}
        self._now = step
        fed: list[nn.Module] = []

        def fed_embeddings(module: nn.Module, given: tuple, named: dict) -> None:
            tensors = [one for one in tree_flatten((given, named))[0] if isinstance(one, Tensor)]
            if not watch.of(*tensors):
                fed.append(module)

        with Dependence(pictures) as watch:
            self._watch = watch
            names = [name for name, _ in self.model.named_modules() if name]
            with hooked(self.model, before=dict.fromkeys(names, fed_embeddings)):
                result = forward(*args, **kwargs)
        for name in self.left & step.keys():
            del step[name]
        self.made += sum(len(calls) for calls in step.values())
        self.served |= step.keys()
        if self._state is None:
            self._fed = list(dict.fromkeys(fed))
            inside = {part for name in step for part in _above(name)} - {""}
            self._around = [self.model, *(self.model.get_submodule(name) for name in sorted(inside))]
            self._state = self._state_now().held()
        if len(self.steps) == MOST_STEPS:
            self.most = max(self.most, self.bytes)
            self.steps.popitem(last=False)
        self.steps[key] = step
        return result

    def _state_now(self) -> State:
        """Of all modules that were fed embeddings alone, of those around layers that are kept, and of autocast."""
        device = next(self.model.parameters()).device.type
        facts = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return State((), *facts, own=[*self._fed, *self._around])


def _split(args: tuple, kwargs: dict) -> tuple[Any, list[Tensor]]:
    """(a key of what layers of few rows may be fed, the tensors that a picture may be in) of a call.

    Tensors of one or two dimensions are times, classes and vectors of a text, and count by their values; of others
    count shape and dtype, for models may read those. The key is None where an argument is of an unknown kind.
    """
    leaves, structure = tree_flatten((args, kwargs))
    key: list[Any] = [str(structure)]
    pictures = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            key.append((tuple(leaf.shape), leaf.dtype, str(leaf.device)))
            if leaf.ndim > 2 or leaf.is_complex():
                pictures.append(leaf)
            else:
                flat = leaf.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)  # of stride 1
                key.append(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, PLAIN):
            key.append((type(leaf), leaf))
        else:
            return None, []
    return tuple(key), pictures


def _above(name: str) -> list[str]:
    """The names of the modules that a module is in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
