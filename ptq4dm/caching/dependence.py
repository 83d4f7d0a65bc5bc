"""What a model computes from some of its inputs: ops are watched while it runs, and what they make is marked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNFILLED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}


class Dependence(TorchDispatchMode):
    """Marks memory that depends on the tensors `sources`, while the mode is on; `of(tensor)` says whether it does.

    Where it is not known that memory does not depend on them, it counts as if it did: memory that is not filled by
    the op that allocates it, since kernels that torch does not see may write there; what is drawn at random; and
    everything from the moment at which the host reads a number that depends on them.

    What it cannot see: values that leave torch by way of NumPy and come back.
    """

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()
        self.everything = False
        self.held = list(sources)  # so that their addresses stay theirs
        self.marked = {_memory(one) for one in self.held}

    def of(self, *tensors: Tensor) -> bool:
        """Whether one of these depends on the sources."""
        return self.everything or any(_memory(one) in self.marked for one in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        before = {_memory(one) for one in given}
        depends = bool(before & self.marked) or torch.Tag.nondeterministic_seeded in func.tags
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if depends and not made and not func._schema.is_mutable:
            self.everything = True  # a number, read by the host
        if depends and func._schema.is_mutable:
            self.marked |= before
        depends = depends or func._schema.name.partition("::")[2] in UNFILLED
        for one in made:
            memory = _memory(one)
            if depends:
                self.marked.add(memory)
            elif memory not in before:
                self.marked.discard(memory)  # an address that was another tensor's
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
