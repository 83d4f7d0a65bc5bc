"""What a model's calls tell about its layers: which share an input, which are fed embeddings, what encloses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import LayerView
from ..record import Calls, replay
from ..sampling import evaluation_mode


@dataclass
class Traced:
    """One layer as it was called.

    shares: the names of all layers that are fed the same tensor, in the order of their calls.
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
    inputs: dict[str, Tensor] = {}
    called: set[str] = set()

    def remember(name: str):
        def hook(_, args, kwargs):
            called.add(name)
            if name in names and name not in inputs:
                inputs[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    names = {view.name for view in views}
    handles = [
        module.register_forward_pre_hook(remember(name), with_kwargs=True) for name, module in model.named_modules()
    ]
    try:
        with evaluation_mode(model):
            replay(model, calls)
    finally:
        for handle in handles:
            handle.remove()
    # All inputs are alive here, so one place in memory is one tensor.
    sharing: dict[tuple, list[str]] = {}
    for name, x in inputs.items():
        sharing.setdefault((x.data_ptr(), tuple(x.shape), x.stride()), []).append(name)
    found = {}
    for members in sharing.values():
        for name in members:
            enclosing = _common(members) if len(members) > 1 else name
            x = inputs[name]
            found[name] = Traced(members, x.ndim > 2, enclosing if enclosing in called else name, block_of(name))
    return found


def block_of(name: str) -> str:
    """The name up to its first number; without one, its first part."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else parts[0]


def _common(names: list[str]) -> str:
    """The longest dotted prefix of all names."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same])
