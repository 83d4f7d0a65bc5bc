"""Bytes that a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_bytes(call: Callable[[], Tensor], but: set[int] = frozenset()) -> int:  # type: ignore[assignment]
    """Bytes of all that autograd keeps of a call, each memory counted once; `but`: addresses that are not counted,
    those of parameters."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in but:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, an output would hold the graph that holds it, for good

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()  # kept until all is counted: freed memory would be counted as one with what comes after
    del result
    return sum(seen.values())
