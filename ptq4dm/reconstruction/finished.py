"""Calls of modules that are over before a layer is first called: their outputs are kept, and they need not run again.

While only one layer of a model changes, all that ends before the layer begins gives what it gave. The largest such
modules are kept whole (a block, not its layers); what is inside an open block is kept part by part. How the model is
put together does not matter: what reaches the output past the layer, over a skip, is kept as any other output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.calls import Calls
from ..calibration.record import answers
from ..hooks import computing, hooked

Finished = list[tuple[str, Any]]
"""(module, its output) of calls, in their order; none of them is inside another."""

PLAIN = (str, int, float, bool, type(None))  # what may stand beside tensors in an output that is kept


class _Reached(Exception):
    """Raised where the layer is called: what comes after it need not run."""


@torch.no_grad()
def finished_before(model: nn.Module, name: str, batch: Calls) -> Finished:
    """The calls that are over when a layer is first called in a batch; all of the model's where it is not called.

    A call that changed its own arguments in place is not kept, and neither is one whose output holds anything but
    tensors and plain values: what is inside such a call is kept instead.
    """
    done: Finished = []
    opened: list[tuple[int, list[int]]] = []  # of each call that is not over: calls kept before it; its arguments

    def enter(module: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if module == name:
                raise _Reached
            opened.append((len(done), versions((args, kwargs))))

        return hook

    def leave(module: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            start, before = opened.pop()
            if before == versions((args, kwargs)) and _is_kept(output):
                done[start:] = [(module, copied(output))]

        return hook

    names = [module for module, _ in model.named_modules() if module]
    before, after = {one: enter(one) for one in names}, {one: leave(one) for one in names}
    with hooked(model, before, after), suppress(_Reached):
        answers(model, batch)
    return done


@contextmanager
def skipping(model: nn.Module, done: Finished) -> Iterator[None]:
    """Let modules give kept outputs instead of being run, as often as there are such; later calls run."""
    queues: dict[str, deque] = {}
    for name, output in done:
        queues.setdefault(name, deque()).append(output)
    kept = {name: _kept_first(queue, model.get_submodule(name).forward) for name, queue in queues.items()}
    with computing(model, kept):
        yield


def size_of(done: Finished) -> int:
    """Bytes of the outputs that are kept."""
    leaves = [leaf for _, output in done for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return sum({leaf.data_ptr(): leaf.nbytes for leaf in leaves}.values())


def copied(output: Any) -> Any:
    """The output with tensors of its own, which whoever gets it may change in place."""
    copies: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
        return copies[id(leaf)]

    return pytree.tree_map(copy, output)


def _kept_first(queue: deque, forward: Callable) -> Callable:
    return lambda *args, **kwargs: copied(queue.popleft()) if queue else forward(*args, **kwargs)


def _is_kept(output: Any) -> bool:
    return all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in pytree.tree_leaves(output))


def versions(arguments: Any) -> list[int]:
    """How often each tensor was changed in place; tensors of inference mode do not count that."""
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]
