"""Where a network is cut in two: layers that every step computes, and a deep part between them that a step may reuse.

In a UNet the deep part is everything below some depth, and what is kept is what it hands to the shallow layers of the
way up (DeepCache: Ma et al., arXiv:2312.00858). In a transformer it is a run of blocks, and what is kept is what they
add to their input. Both are lists of modules in the order in which the network calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..checks import check
from ..errors import UserError

IN_A_LAYER = ("resnets", "attentions", "temp_convs", "temp_attentions", "motion_modules")
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


@dataclass(frozen=True)
class Cut:
    """The deep part: names of its modules in the order of their calls.

    adds: what is kept is added to the input of the first one; else it stands for what the last one gives.
    deepest: the largest depth that the network can be cut at.
    """

    units: tuple[str, ...]
    adds: bool
    deepest: int


def cut(model: nn.Module, depth: int, what: str = "the model") -> Cut:
    """The deep part below `depth` layers.

    depth: of a UNet the layers (a residual block with its attention, or what halves the size) that are computed on
        the way down, as many on the way up, and one more there; of a transformer the blocks before the deep part, and
        as many behind it.

    Raises UserError for a depth that leaves no deep part, and for networks of another build.
    """
    depth = check(depth, int, "depth", 0)
    parts = ("down_blocks", "mid_block", "up_blocks")
    found = _unet(model, depth) if all(hasattr(model, name) for name in parts) else _transformer(model, depth)
    if found is None and len(_blocks(model)) == 1:
        raise UserError(f"{what}, {type(model).__name__}, has a single block, so no part of it is deep.")
    if found is None:
        raise UserError(
            f"{what}, {type(model).__name__}, has no deep part that ptq4dm knows: it is neither a UNet whose layers "
            "on the way up are those on the way down and one more, nor has it a list of blocks."
        )
    if depth > found.deepest:
        raise UserError(f"{what} can be cut at a depth from 0 to {found.deepest}, not at {depth}.")
    return found


def _unet(model: nn.Module, depth: int) -> Cut | None:
    down = [layer for name, block in _listed(model, "down_blocks") for layer in _layers(name, block, "downsamplers")]
    up: list[list[str]] = []
    for name, block in _listed(model, "up_blocks"):
        up += _layers(name, block, "")
        if up:
            up[-1] += [one for one, _ in _listed(block, "upsamplers", f"{name}.")]
    if not down or len(up) != len(down) + 1:
        return None
    middle = ["mid_block"] if isinstance(model.mid_block, nn.Module) else []
    deep = [*down[depth:], middle, *up[: max(len(down) - depth, 0)]]
    return Cut(tuple(name for layer in deep for name in layer), False, len(down) - 1)


def _layers(name: str, block: nn.Module, behind: str) -> list[list[str]]:
    """The layers of a block of a UNet, each a list of modules; modules of the list `behind` are one more."""
    columns = [dict(_listed(block, part, f"{name}.")) for part in IN_A_LAYER]
    count = max(map(len, columns), default=0)
    rows: list[list[str]] = [[] for _ in range(count)]
    for column in columns:
        for row, one in zip(rows, column, strict=False):
            row.append(one)
    last = [one for one, _ in _listed(block, behind, f"{name}.")] if behind else []
    return [*rows, last] if last else rows


def _listed(module: nn.Module, attribute: str, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules in a list of a module."""
    listed = getattr(module, attribute, None)
    if isinstance(listed, nn.ModuleList):
        for place, one in listed.named_children():
            yield f"{prefix}{attribute}.{place}", one


def _transformer(model: nn.Module, depth: int) -> Cut | None:
    names = _blocks(model)
    if len(names) < 2:
        return None
    return Cut(tuple(names[depth : len(names) - depth]), True, (len(names) - 1) // 2)


def _blocks(model: nn.Module) -> list[str]:
    """The names of a transformer's main blocks: those of the lists of this name, else of its longest list."""
    lists = {name: one for name, one in model.named_children() if isinstance(one, nn.ModuleList) and len(one)}
    known = [name for name in BLOCKS if name in lists]
    if not known:
        known = sorted(lists, key=lambda name: len(lists[name]))[-1:]
    return [one for name in known for one, _ in _listed(model, name)]
