"""Facts about layers, read off a model's calls: which share an input or are fed embeddings, what encloses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hooks import hooked, input_of
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode
from .calls import Calls
from .record import replay


@dataclass
class Traced:
    """One layer as it was called.

    shares: the names of all layers of its block that are fed the same tensor, in the order of their calls.
    tokens: whether its input has a token (or pixel) axis; an embedding [B, K] has not.
    enclosing: the innermost module that holds all layers of `shares`, if it is called as a module; the layer itself
        where it shares with none.
    block: the repeated block that it is in ("transformer_blocks.3"), or the model's child.
    """

    shares: list[str]
    tokens: bool
    enclosing: str
    block: str


@torch.no_grad()
def trace(model: nn.Module, views: list[LayerView], calls: Calls) -> dict[str, Traced]:
    """Layer name -> what was seen while the model ran on recorded calls; layers never called are left out."""
    inputs: dict[str, tuple[Tensor, int]] = {}
    called: set[str] = set()

    def remember(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            called.add(name)
            if name in names and name not in inputs:
                x = input_of(args, kwargs)
                inputs[name] = x, 0 if x.is_inference() else x._version  # counts changes in place

        return hook

    names = {view.name for view in views}
    before = {name: remember(name) for name, _ in model.named_modules()}
    with evaluation_mode(model), hooked(model, before):  # in this order: no other thread's calls reach the hooks
        replay(model, calls)
    # All inputs are alive here, so one place in memory is one tensor.
    sharing: dict[tuple, list[list[str]]] = {}
    for name, (x, version) in inputs.items():
        groups = sharing.setdefault((x.data_ptr(), version, tuple(x.shape), x.stride()), [])
        group = next((group for group in groups if _one_block(group[0], name)), None)
        groups.append([name]) if group is None else group.append(name)
    found = {}
    for members in (group for groups in sharing.values() for group in groups):
        enclosing = _common(members)
        for name in members:
            inner = enclosing if len(members) > 1 and enclosing in called else name
            found[name] = Traced(members, inputs[name][0].ndim > 2, inner, block_of(name))
    return found


def block_of(name: str) -> str:
    """The name up to its first number; without one, its first part."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else parts[0]


def _one_block(name: str, other: str) -> bool:
    """True if two layers are of one repeated block: all blocks may be fed one text, and share nothing else."""
    parts = zip(name.split("."), other.split("."), strict=False)
    one, two = next(((a, b) for a, b in parts if a != b), ("", ""))
    return block_of(name) == block_of(other) and not (one.isdigit() and two.isdigit())


def _common(names: list[str]) -> str:
    """The longest dotted prefix of all names."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same])
