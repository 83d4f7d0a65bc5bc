"""What is kept of the values in a module's output, and how they are given again: as new ones, which whoever gets them
may change in place.

A tensor that nobody will read has its shape alone. It is given as NaN: should anybody read it after all, it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Passed:
    """The module gave one of its arguments: this leaf of them."""

    place: int


@dataclass(frozen=True)
class Unread:
    """A tensor of floating numbers that nothing reads any more."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Away:
    """A tensor that is kept on the CPU for a module on another device."""

    tensor: Tensor
    device: torch.device


def kept_leaf(leaf: Any, read: bool, arguments: list) -> Any:
    """A value of an output as it is kept; `arguments` are the leaves that the module was called with."""
    if not isinstance(leaf, Tensor):
        return leaf
    place = next((i for i, one in enumerate(arguments) if one is leaf), None)
    if place is not None:
        return Passed(place)
    return leaf.clone() if read else unread(leaf)


def unread(leaf: Any) -> Any:
    """What is kept of a value that nothing reads any more. Whole numbers and truth values stay: they know no NaN."""
    if isinstance(leaf, Away):
        like, device = leaf.tensor, leaf.device
    elif isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        like, device = torch.empty_like(leaf, device="meta"), leaf.device  # with the strides that a clone has
    else:
        return leaf
    return Unread(like.shape, like.stride(), like.dtype, device)


def away(leaf: Any) -> Any:
    """A kept value that needs no room on the model's device."""
    there = isinstance(leaf, Tensor) and leaf.device.type != "cpu" and (leaf.is_floating_point() or leaf.is_complex())
    return Away(leaf.cpu(), leaf.device) if there else leaf


def bytes_of(leaf: Any) -> int:
    """Bytes of what is kept of a value."""
    tensor = leaf.tensor if isinstance(leaf, Away) else leaf
    return tensor.nbytes if isinstance(tensor, Tensor) else 0


def is_on_cpu(leaf: Any) -> bool:
    """Whether a kept value takes its room on the CPU."""
    return isinstance(leaf, Away) or (isinstance(leaf, Tensor) and leaf.device.type == "cpu")


def given(output: Any, arguments: Any) -> Any:
    """An output that was kept, for a module that is called with these arguments."""
    made: dict[int, Tensor] = {}
    passed: list = []

    def give(leaf: Any) -> Any:
        if isinstance(leaf, Passed):
            if not passed:
                passed.extend(pytree.tree_leaves(arguments))
            return passed[leaf.place]
        if not isinstance(leaf, (Tensor, Unread, Away)):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = _made(leaf)
        return made[id(leaf)]

    return pytree.tree_map(give, output)


def _made(leaf: Tensor | Unread | Away) -> Tensor:
    if isinstance(leaf, Away):
        return leaf.tensor.to(leaf.device)
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=leaf.device).fill_(float("nan"))
