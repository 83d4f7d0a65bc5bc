"""The deep part of a network: computed and kept, or left out and what was kept put in its place."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UserError
from ..interrupts import uninterrupted
from .cut import Cut

PUT_IN: WeakKeyDictionary[nn.Module, DeepPart] = WeakKeyDictionary()  # networks, and the modules of their deep parts
_serial = itertools.count()


@dataclass
class Kept:
    """What the deep part gave in the latest calls. steps: of the sampler, of these calls, the latest first.

    parts: for each tensor that the last unit gave `history` of them, the latest first, at fixed places, so that a
        graph can read and write them, in the order in memory that it has (channels last, where it is so).
    weights: [history] float32, what they are summed with.
    added: for each of them the argument of the first unit that it is added to; None: it stands for itself.
    forms: of what each unit gave. number: no other one has it.
    """

    steps: list[int] = field(default_factory=list)
    parts: dict[int, list[Tensor]] = field(default_factory=dict)
    added: dict[int, Any] = field(default_factory=dict)
    forms: dict[int, Any] = field(default_factory=dict)
    structure: Any = None
    weights: Tensor | None = None
    number: int = field(default_factory=lambda: next(_serial))

    @property
    def bytes(self) -> int:
        return sum(one.nbytes for part in self.parts.values() for one in part)


def under_way(*modules: nn.Module) -> DeepPart | None:
    """The deep part, of one of these networks or with one of these modules in it, that a call of this thread computes
    or reuses now."""
    for part in map(PUT_IN.get, modules) if PUT_IN else ():
        if part is not None and part.kept is not None and threading.get_ident() == part.owner:
            return part
    return None


def reuse_of(model: nn.Module) -> tuple[int, bool] | None:
    """Which kept deep part the call of a network that is under way reads or writes, and whether it reuses it; None
    for neither. Calls that differ in it do not share a graph."""
    part = under_way(model)
    return None if part is None or part.kept is None else (part.kept.number, part.reuses)


class DeepPart:
    """The modules of a cut, while calls of them go through here. See `put_in`, `computed` and `reused`."""

    def __init__(self, model: nn.Module, cut: Cut, history: int = 1) -> None:
        self.model, self.cut, self.history = model, cut, history
        self.modules = [model.get_submodule(name) for name in cut.units]
        self.owner = threading.get_ident()
        self.kept: Kept | None = None  # of the call that is under way
        self.reuses = False
        self.uncompiled = False  # whether compiled code around the modules ran as written, which needs them called
        self._given: dict[Any, Tensor] = {}
        self._next: dict[int, Any] = {}
        self._outputs: list[Any] = []

    @contextmanager
    def put_in(self) -> Iterator[None]:
        """In the block calls of the modules go through here; hooks on a module that is left out do not run.

        The slot is the one that torch's own `Module.compile` fills: a compiled block stays compiled. torch.compile's
        code of a module around them does not look at it: who has such code runs as written while a call is
        `under_way`.

        Raises UserError where the network has a deep part put in already.
        """
        if self.model in PUT_IN:
            raise UserError(f"{type(self.model).__name__} has cached steps already; one plan at a time.")
        before = [vars(module).get("_compiled_call_impl") for module in self.modules]
        try:
            with uninterrupted():
                for place, module in enumerate(self.modules):
                    module._compiled_call_impl = _Unit(self, place, module)
                PUT_IN.update(dict.fromkeys([self.model, *self.modules], self))
            yield
        finally:
            with uninterrupted():
                for module in [self.model, *self.modules]:
                    PUT_IN.pop(module, None)
                for module, one in zip(self.modules, before, strict=True):
                    vars(module).pop("_compiled_call_impl", None)
                    if one is not None:
                        module._compiled_call_impl = one

    def computed(self, kept: Kept, step: int, call: Callable[[], Any]) -> Any:
        """call(), and what the deep part gives is kept. step: of the sampler."""
        before, kept.steps = kept.steps, []
        for part in kept.parts.values():  # not in the call: who captures a graph of it may run it more than once
            for older in range(self.history - 1, 0, -1):
                part[older].copy_(part[older - 1])
        output = self._within(kept, False, call)
        kept.steps = [step, *before][: self.history]
        return output

    def reused(self, kept: Kept, weights: Sequence[float], call: Callable[[], Any]) -> Any:
        """call() with the deep part left out, and what was kept in its place, the latest by the first weight."""
        if kept.weights is not None:
            row = [*weights, *[0.0] * self.history][: self.history]
            kept.weights.copy_(torch.tensor(row, dtype=torch.float32))
        return self._within(kept, True, call)

    def _within(self, kept: Kept, reuses: bool, call: Callable[[], Any]) -> Any:
        self.kept, self.reuses = kept, reuses
        try:
            output = call()
        finally:
            self.kept = None
            self._given, self._next, self._outputs = {}, {}, []
        if not kept.parts:
            raise UserError(
                f"{type(self.model).__name__} does not call '{self.cut.units[0]}' to '{self.cut.units[-1]}' one by "
                "one (an engine or compiled code computes it, or it has another build), so no part of it can be "
                "reused."
            )
        return output

    def unit(self, place: int, inner: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """A module's call."""
        kept = self.kept
        if kept is None or threading.get_ident() != self.owner:
            return inner(*args, **kwargs)
        last = place == len(self.modules) - 1
        if place == 0:
            self._given = _tensors(args, kwargs)
        if self.reuses:
            return (
                self._put_together(kept) if last else pytree.tree_map_only(_Form, _Form.stand_in, kept.forms[place])
            )
        if place == 1:
            self._next = _tensors(args, kwargs)
        output = inner(*args, **kwargs)
        if place == 0:
            self._outputs = pytree.tree_leaves(output)
        kept.forms[place] = pytree.tree_map_only(Tensor, _form, output)
        if last:
            self._keep(kept, output)
        return output

    def _keep(self, kept: Kept, output: Any) -> None:
        leaves, kept.structure = pytree.tree_flatten(output)
        for k, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            key = self._input_of(k, leaf) if self.cut.adds else None
            value = leaf if key is None else leaf - self._given[key]
            place = kept.parts.get(k)
            if place is None:
                place = kept.parts[k] = [torch.zeros_like(value) for _ in range(self.history)]
                if self.history > 1:
                    kept.weights = torch.zeros(self.history, device=value.device)
            place[0].copy_(value)
            kept.added[k] = key

    def _input_of(self, k: int, leaf: Tensor) -> Any:
        """The argument of the first unit that the k-th tensor of the last one continues: the one that the second
        unit has in the place where it is given the first one's k-th."""
        first = self._outputs[k] if k < len(self._outputs) else None
        same = [key for key, one in self._next.items() if one is first]
        fits = [key for key, one in self._given.items() if one.shape == leaf.shape and one.dtype == leaf.dtype]
        return next((key for key in (*same, *fits[:1]) if key in fits), None)

    def _put_together(self, kept: Kept) -> Any:
        def made(k: int) -> Tensor:
            key, part = kept.added[k], kept.parts[k]
            if kept.weights is None:
                return part[0].clone() if key is None else self._given[key] + part[0]
            total = part[0].float() * kept.weights[0]
            for one, weight in zip(part[1:], kept.weights[1:], strict=True):
                total = total + one * weight
            total = total.to(part[0].dtype)
            return total if key is None else self._given[key] + total

        leaves = [None] * kept.structure.num_leaves
        return kept.structure.unflatten([made(k) if k in kept.parts else leaf for k, leaf in enumerate(leaves)])


class _Unit:
    """What the calls of a module go through. A copy of the module has nothing of it (torch leaves the slot out)."""

    def __init__(self, part: DeepPart, place: int, module: nn.Module) -> None:
        self.part, self.place = part, place
        self.inner = vars(module).get("_compiled_call_impl") or module._call_impl

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.part.unit(self.place, self.inner, args, kwargs)


def _tensors(args: tuple, kwargs: Mapping[str, Any]) -> dict[Any, Tensor]:
    """Place or name -> tensor of a call."""
    return {key: one for key, one in [*enumerate(args), *kwargs.items()] if isinstance(one, Tensor)}


@dataclass(frozen=True)
class _Form:
    """Of a tensor that was given by a module which is left out now."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def stand_in(self) -> Tensor:
        """A tensor of this form in the memory of one number; nobody looks at its values."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


def _form(tensor: Tensor) -> _Form:
    return _Form(tuple(tensor.shape), tensor.dtype, tensor.device)
