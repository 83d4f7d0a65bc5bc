"""Calls of modules that are over before others are first called: their outputs are kept, and they need not run again.

While only what comes later changes, all that ends before gives what it gave. The largest such modules are kept whole
(a block, not its layers); what is inside an open block is kept part by part. How the model is put together does not
matter: what reaches the output past the open part, over a skip, is kept as any other output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.calls import Calls
from ..calibration.record import answers
from ..hooks import computing, hooked
from ..kernels.runtime.prepared import version_of
from .leaves import bytes_of, given, is_on_cpu, kept_leaf, unread

PLAIN = (str, int, float, bool, type(None))  # what may stand beside tensors in an output that is kept


class Over(NamedTuple):
    """A call that is over.

    key: which call it is, see `Frame`; output: containers as the module gave them, with leaves of leaves.py.
    """

    module: str
    output: Any
    key: str


Finished = list[Over]
"""In the order of the calls; none of them is inside another."""
Reads = Collection[tuple[str, int]]
"""(key of a call, number of a leaf of its output): what is read later."""


class _Reached(Exception):
    """Raised where a stop is called: what comes after it need not run."""


@dataclass
class Frame:
    """A call that is not over.

    key: the modules called on the way to it, each with the number of its call inside the one around it: the same
        whether what came before is run or skipped. start: calls kept before it. arguments: versions of what it got.
    """

    key: str = ""
    start: int = 0
    arguments: list = field(default_factory=list)
    inner: dict[str, int] = field(default_factory=dict)

    def enter(self, module: str, start: int, arguments: list) -> Frame:
        number = self.inner[module] = self.inner.get(module, -1) + 1
        return Frame(f"{self.key}/{module}#{number}", start, arguments)


@torch.no_grad()
def finished_before(
    model: nn.Module,
    stops: Collection[str],
    batch: Calls,
    done: Sequence[Over] = (),
    reads: Reads | None = None,
    opened: Collection[str] = (),
) -> Finished:
    """The calls that are over when the first of some modules is called in a batch; all where none of them is.

    A call that changed its own arguments in place is not kept, and neither is one whose output holds anything but
    tensors and plain values, or a part of an argument: what is inside such a call is kept instead.

    done: what was over before; it is not run again. reads: the leaves that are read after the stop; of other ones the
    shapes alone are kept. None keeps all. opened: modules that are never kept whole.
    """
    found: Finished = []
    frames = [Frame()]
    before = {one.key: one for one in done}

    def enter(module: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if module in stops:
                raise _Reached
            frames.append(frames[-1].enter(module, len(found), versions((args, kwargs))))

        return hook

    def leave(module: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            frame = frames.pop()
            if frame.key in before:  # it was not run: what is kept of it stays, or less of it
                kept = _mapped(before[frame.key].output, frame.key, reads, lambda x, read: x if read else unread(x))
            elif (
                module in opened
                or frame.arguments != versions((args, kwargs))
                or not may_be_kept(output, arguments := pytree.tree_leaves((args, kwargs)))
            ):
                return
            else:
                kept = _mapped(output, frame.key, reads, lambda x, read: kept_leaf(x, read, arguments))
            found[frame.start :] = [Over(module, kept, frame.key)]

        return hook

    names = [module for module, _ in model.named_modules() if module]
    hooks = {one: enter(one) for one in names}, {one: leave(one) for one in names}
    with skipping(model, done), hooked(model, *hooks), suppress(_Reached):
        answers(model, batch)
    return found


@contextmanager
def skipping(model: nn.Module, done: Sequence[Over]) -> Iterator[None]:
    """Let modules give kept outputs instead of being run, as often as there are such; later calls run."""
    queues: dict[str, deque] = {}
    for one in done:
        queues.setdefault(one.module, deque()).append(one.output)
    kept = {name: _kept_first(queue, model.get_submodule(name).forward) for name, queue in queues.items()}
    with computing(model, kept):
        yield


def size_of(done: Sequence[Over], *, on_cpu: bool | None = None) -> int:
    """Bytes of the outputs that are kept; of those on the CPU alone, or of all others, where that is asked for."""
    leaves = {id(leaf): leaf for one in done for leaf in pytree.tree_leaves(one.output)}
    return sum(bytes_of(leaf) for leaf in leaves.values() if on_cpu is None or is_on_cpu(leaf) == on_cpu)


def may_be_kept(output: Any, arguments: Sequence) -> bool:
    """Whether an output consists of tensors and plain values, none of them a part of an argument: who changes such a
    part changes the argument. The whole argument is none: a module that is skipped gives its own."""
    places = {leaf.untyped_storage().data_ptr() for leaf in arguments if isinstance(leaf, Tensor) and leaf.numel()}
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, (Tensor, *PLAIN)):
            return False
        passed = any(leaf is one for one in arguments)
        if isinstance(leaf, Tensor) and not passed and leaf.numel() and leaf.untyped_storage().data_ptr() in places:
            return False
    return True


def versions(arguments: Any) -> list:
    """Which tensors they are, and how often each was changed in place, which those of inference mode do not count."""
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return [(id(leaf), version_of(leaf)) for leaf in leaves]


def _mapped(output: Any, key: str, reads: Reads | None, change: Callable[[Any, bool], Any]) -> Any:
    """An output with each value changed, by whether it is read."""
    leaves, structure = pytree.tree_flatten(output)
    read = {id(leaf) for i, leaf in enumerate(leaves) if reads is None or (key, i) in reads}
    # A tensor that is given twice is kept once: who changes one changes both.
    found = {id(leaf): change(leaf, id(leaf) in read) for leaf in leaves}
    return pytree.tree_unflatten([found[id(leaf)] for leaf in leaves], structure)


def _kept_first(queue: deque, forward: Callable) -> Callable:
    def given_or_run(*args: Any, **kwargs: Any) -> Any:
        return given(queue.popleft(), (args, kwargs)) if queue else forward(*args, **kwargs)

    return given_or_run
