"""Facts about layers, read off a model's calls: which share an input or are fed embeddings, what encloses them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..hooks import hooked, input_of
from ..kernels.runtime.prepared import version_of
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode, time_names
from .calls import Call, Calls
from .record import answers, named

LOOKS = 4  # calls that are replayed at most


@dataclass
class Traced:
    """One layer as it was called.

    shares: the names of all layers of its block that are fed the same tensor, in the order of their calls.
    tokens: whether it is fed tokens (or pixels), packed ones [S, K] too; not embeddings, of which a sample has one.
    enclosing: the innermost module that holds all layers of `shares`, if it is called as a module; the layer itself
        where it shares with none.
    block: the repeated block that it is in ("transformer_blocks.3"), or the model's child.
    """

    shares: list[str]
    tokens: bool
    enclosing: str
    block: str


def trace(model: nn.Module, views: list[LayerView], calls: Calls) -> dict[str, Traced]:
    """Layer name -> what was seen while the model ran on recorded calls; layers never called are left out.

    One call tells nearly all. Up to LOOKS are replayed for layers that were not called in it, or fed as many rows as
    there are samples: experts of a mixture get some of the tokens, now none, now as many as that.
    """
    found: dict[str, Traced] = {}
    for number in torch.linspace(0, len(calls) - 1, min(len(calls), LOOKS)).long().tolist():
        unsure = [view for view in views if view.name not in found or not found[view.name].tokens]
        if not unsure:
            break
        for name, seen in _trace(model, unsure, calls[number : number + 1]).items():
            if name not in found:
                found[name] = seen
            found[name].tokens |= seen.tokens
    return found


@torch.no_grad()
def _trace(model: nn.Module, views: list[LayerView], calls: Calls) -> dict[str, Traced]:
    inputs: dict[str, tuple[Tensor, int]] = {}
    called: set[str] = set()
    tokens: set[str] = set()
    samples: set[int] = set()

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            called.add(name)
            if not name:
                samples.update(sample_counts(named(module, Call(args, kwargs))))
            if name not in names:
                return
            x = input_of(args, kwargs)
            if fed_tokens(x, samples):
                tokens.add(name)
            if name not in inputs and x.numel():
                inputs[name] = x, version_of(x)

        return hook

    names = {view.name for view in views}
    before = {name: remember(name) for name, _ in model.named_modules()}
    with evaluation_mode(model), hooked(model, before):  # in this order: no other thread's calls reach the hooks
        answers(model, calls)
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
            found[name] = Traced(members, name in tokens, inner, block_of(name))
    return found


def sample_counts(arguments: dict[str, Any]) -> set[int]:
    """How many samples a call has, by its arguments by name, in each way of telling: the times it is called with, and
    the first axis of a first argument that cannot be packed tokens [S, K]."""
    times = time_names(list(arguments))
    counts = {
        leaf.numel() if isinstance(leaf, Tensor) else 1
        for name in times
        for leaf in pytree.tree_leaves(arguments[name])
        if leaf is not None
    }
    first = next((value for name, value in arguments.items() if name not in times), None)
    if (isinstance(first, Tensor) and first.ndim > 2) or isinstance(first, (list, tuple)):
        counts.add(len(first))
    return counts


def fed_tokens(x: Tensor, samples: Collection[int]) -> bool:
    """Whether an input of a layer holds tokens or pixels rather than an embedding of each sample.

    x: [B, ..., K] has a token axis; [S, K] is packed tokens, but where it has one row a sample, or the rows of the
    samples repeated (an embedding for each frame). samples: how many there may be (`sample_counts`).
    """
    if x.ndim != 2:
        return x.ndim > 2 and x.numel() > 0
    rows = len(x)
    return rows > 0 and not any(rows == count or _repeated(x, count) for count in samples)


def _repeated(x: Tensor, count: int) -> bool:
    """Whether the rows of x are those of `count` samples, each several times."""
    if count < 1 or len(x) % count:
        return False
    in_turn, in_a_row = x.reshape(-1, count, x.shape[1]), x.reshape(count, -1, x.shape[1])
    return bool((in_turn == in_turn[:1]).all() or (in_a_row == in_a_row[:, :1]).all())


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
