"""Who reads what in one call of a model: every operation on tensors, and the modules around it.

Tensors are told apart by their storage, so that views and changes in place need no rules of their own. Rather too
much counts as read than too little: an operation reads all its tensors, a module all its arguments, and a value that
nobody was seen to make (by a kernel that writes where PyTorch does not look) is made of all that its module had.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..calibration.record import tensors_of
from .finished import Frame, may_be_kept


@dataclass
class Step:
    """One operation, or what a module was given or gave. Its number is its time.

    reads: the steps that made what it reads. inside: the number of the innermost call around it. decides: whether
        Python or shapes may depend on its values. leaves: of an output, the leaves of the call that it made.
    """

    reads: tuple[int, ...]
    inside: int
    decides: bool = False
    leaves: tuple[int, ...] = ()


@dataclass
class ModuleCall:
    """One call of a module. parent: the number of the call around it; start, end: the steps of its arguments and of
    its output; kept: whether its output may be kept."""

    module: str
    key: str
    parent: int
    start: int
    end: int = -1
    kept: bool = False
    inner: list[int] = field(default_factory=list)


@dataclass
class _Stored:
    """What is known of a storage. born, made: the steps of its first and its last value; of constants -1."""

    ref: StorageWeakRef | None  # as long as it lives no other storage has this place
    born: int
    made: int
    written: bool = True


@dataclass
class _Open:
    """A call that is not over. frame: for its key; given: its tensors; made: the steps that made values in it;
    changed: whether it changed in place what was there before it."""

    number: int
    frame: Frame
    given: list[Tensor] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    changed: bool = False


class Dataflow:
    """The steps and the calls of modules of one call of a model; calls[0] is that of the model itself."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.calls: list[ModuleCall] = [ModuleCall("", "", -1, 0, kept=False)]
        self._stored: dict[int, _Stored] = {}
        self._open: list[_Open] = [_Open(0, Frame())]

    def constants(self, tensors: Iterable[Any]) -> None:
        """What is there already."""
        for tensor in tensors:
            self._of(tensor, -1)

    def operation(self, func: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """Note an operation that was made."""
        found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {place: leaf for leaf in found if (place := _place(leaf)) is not None}
        written = _written(func, args, kwargs)
        # Who changes a tensor, or looks at it otherwise, has not read what nobody was seen to write.
        looks = set(given) if getattr(func, "is_view", False) else written
        reads = [self._made_by(leaf) for place, leaf in given.items() if place not in looks or self._known(place)]
        step = self._step(reads, decides=_decides(func, args))
        for place in written:
            if place in given:
                stored = self._of(given[place], step)
                stored.made, stored.written = step, True
                for call in self._open:
                    call.changed |= stored.born < self.calls[call.number].start
        fresh = not str(func).startswith(("aten.empty", "aten.new_empty"))
        for leaf in pytree.tree_leaves(output):
            if (place := _place(leaf)) is not None and place not in self._stored and place not in given:
                self._of(leaf, step).written = fresh

    def enter(self, module: str, arguments: Any) -> None:
        """A module is called."""
        around, given = self._open[-1], [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        start = self._step([self._made_by(leaf) for leaf in given])
        frame = around.frame.enter(module, 0, [])
        number = len(self.calls)
        self.calls.append(ModuleCall(module, frame.key, around.number, start))
        self.calls[around.number].inner.append(number)
        self._open.append(_Open(number, frame, given))

    def leave(self, arguments: Any, output: Any) -> None:
        """The module that was called last gives something."""
        done = self._open.pop()
        call, leaves = self.calls[done.number], pytree.tree_leaves(output)
        passed = {id(leaf) for leaf in done.given}
        kept = not done.changed and may_be_kept(output, pytree.tree_leaves(arguments))
        places: dict[int, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) not in passed and (place := _place(leaf)) is not None:
                places.setdefault(place, []).append(i)
        given = self._known_steps(done.given)
        for numbers in places.values():
            leaf = leaves[numbers[0]]
            made = self._made_by(leaf, done)
            kept = kept and self._of(leaf, made).born > call.start  # else it is somebody's, who may give it again
            step = self._step([made, *given], inside=done.number, leaves=tuple(numbers))
            self._of(leaf, step).made = step
            self._open[-1].made.append(step)
        call.end, call.kept = len(self.steps), kept

    def finish(self, answer: Any) -> None:
        """The model has answered."""
        self._step([self._made_by(leaf) for leaf in tensors_of(answer)])

    def _step(
        self, reads: Iterable[int], *, decides: bool = False, inside: int | None = None, leaves: tuple = ()
    ) -> int:
        around = self._open[-1]
        made = tuple({one for one in reads if one >= 0})
        self.steps.append(Step(made, around.number if inside is None else inside, decides, leaves))
        if inside is None:
            around.made.append(len(self.steps) - 1)
        return len(self.steps) - 1

    def _made_by(self, tensor: Tensor, within: _Open | None = None) -> int:
        """The step that made what a tensor holds now; a new one of all that is here, where nobody was seen at it."""
        place = _place(tensor)
        if place is None:
            return -1
        stored = self._stored.get(place)
        if stored is None or not stored.written:
            here = within or self._open[-1]
            step = self._step([*here.made, *self._known_steps(here.given)], inside=here.number)
            stored = self._of(tensor, step)
            stored.made, stored.written = step, True
        return stored.made

    def _known_steps(self, tensors: Iterable[Tensor]) -> list[int]:
        stored = [self._stored.get(_place(one) or 0) for one in tensors]
        return [one.made for one in stored if one is not None]

    def _known(self, place: int) -> bool:
        return place in self._stored and self._stored[place].written

    def _of(self, tensor: Tensor, step: int) -> _Stored:
        place = _place(tensor)
        if place is None:
            return _Stored(None, step, step)
        if place not in self._stored:
            self._stored[place] = _Stored(StorageWeakRef(tensor.untyped_storage()), step, step)
        return self._stored[place]


def _place(tensor: Any) -> int | None:
    """Where a tensor's storage is; None of what is no plain tensor."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return None
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a subclass that stands for others has none
        return None


def _written(func: Any, args: tuple, kwargs: dict) -> set[int]:
    """The storages that an operation changes."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return set()
    written: set[int] = set()
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written |= {place for leaf in pytree.tree_leaves(value) if (place := _place(leaf)) is not None}
    return written


def _decides(func: Any, args: tuple) -> bool:
    """Whether an operation's values tell Python something, or decide on shapes."""
    tags = getattr(func, "tags", ())
    if torch.Tag.dynamic_output_shape in tags and str(func).startswith("aten.index."):
        masks = [leaf for leaf in pytree.tree_leaves(args[1:]) if isinstance(leaf, Tensor)]
        return any(leaf.dtype in (torch.bool, torch.uint8) for leaf in masks)
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
