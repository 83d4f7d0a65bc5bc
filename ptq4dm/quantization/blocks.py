"""The blocks that a plan is packed in, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..calibration.calls import Calls
from ..calibration.trace import block_of
from ..errors import UserError
from ..layers.plan import Plan
from ..layers.registry import FORMATS
from ..reconstruction.blocks import call_order, trained_together


@dataclass
class Block:
    """The problems of one block: leader -> names of the layers, itself first. name: also of its checkpoint."""

    name: str
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        return [name for names in self.problems.values() for name in names]


def blocks_of(model: nn.Module, plan: Plan, calls: Calls | None = None) -> list[Block]:
    """The problems of a plan, block by block, in the order of the model (files sort plans by name).

    calls: with recorded calls, blocks come in the order in which the model calls them; where the plan has learning,
    they are what it trains together.

    Raises UserError where a layer follows one that has another format or is not in the plan.
    """
    problems: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if (choice := plan.layers.get(name)) is not None:
            problems.setdefault(FORMATS.find(choice.format).leader(name, choice), []).append(name)
    for leader, names in problems.items():
        if names[0] != leader or len({plan.layers[name].format for name in names}) > 1:
            raise UserError(f"the plan is damaged: '{names[0]}' borrows from '{leader}', which has nothing to lend.")
    order = list(problems)
    name_of: Callable[[str], str] = block_of
    if calls is not None:
        order, name_of = _by_calls(model, order, plan, calls)
    blocks: dict[str, Block] = {}
    for leader in order:
        block = name_of(leader)
        blocks.setdefault(block, Block(block)).problems[leader] = problems[leader]
    return list(blocks.values())


def still_to_come(blocks: list[Block], enclosing: Mapping[str, str], trained: Collection[str]) -> list[set[str]]:
    """Of each block the modules whose calls it is packed by, and those of all blocks after it: its layers, what is
    around its problems (leader -> module), and the block itself where layers of it are trained together."""
    found: list[set[str]] = []
    for block in reversed(blocks):
        own = {*block.layers, *(enclosing[leader] for leader in block.problems if leader in enclosing)}
        if not own.isdisjoint(trained):
            own.add(block.name)
        found.insert(0, own | (found[0] if found else set()))
    return found


def _by_calls(
    model: nn.Module, leaders: list[str], plan: Plan, calls: Calls
) -> tuple[list[str], Callable[[str], str]]:
    if plan.learning is None:
        return call_order(model, leaders, calls), block_of
    together = trained_together(model, leaders, plan.learning.unit, calls)
    return list(together), together.__getitem__
