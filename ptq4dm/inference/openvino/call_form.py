"""What calls of a network that one conversion serves agree in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...caching.state import PLAIN

HALVES = (torch.bfloat16, torch.float16)


def form_of_call(leaves: list, structure: Any) -> tuple | str:
    """The form: which arguments are tensors, their types and sizes but for the batch, and the values of all others;
    a text: why there can be none."""
    batch = batch_of(tensors_in(leaves))
    facts: list[Any] = [repr(structure)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.device.type != "cpu":
                return "a tensor is sparse, or not on the CPU"
            if leaf.dtype in HALVES:
                return f"a tensor is of {leaf.dtype}"
            facts += str(leaf.dtype), tuple(shape_of(leaf, batch, "batch"))
        elif isinstance(leaf, PLAIN):
            facts += type(leaf).__name__, repr(leaf)
        else:
            return f"an argument is of the class {type(leaf).__name__}"
    return tuple(facts)


def tensors_in(leaves: list) -> list[Tensor]:
    """The tensors among the parts of a call's arguments."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def batch_of(tensors: list[Tensor]) -> int:
    """How many samples a call has: the length of its first tensor of several axes; -1 where it has none."""
    return next((len(one) for one in tensors if one.ndim > 1), -1)


def shape_of(tensor: Tensor, batch: int, called: Any) -> list[Any]:
    """The shape, with `called` for the first size where that is the batch."""
    return [called if i == 0 and size == batch else size for i, size in enumerate(tensor.shape)]
