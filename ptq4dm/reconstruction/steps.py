"""The steps that train a block: along the gradients of its loss, by rates that fall to zero.

Soft codes are driven to whole numbers meanwhile, by AdaRound's penalty (arXiv:2004.10568).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rounding.learned import Learning
from ..rounding.optimizers import OPTIMIZERS, falling, move
from .items import Item
from .replay import Replay
from .soft import SoftLayer

WARM_UP = 0.2  # the share of steps before soft codes are driven to whole numbers
SHARPNESS = (20.0, 2.0)  # of that penalty, at first and at the end
PENALTY = 0.1  # its weight against the loss, which is 1 where weights are rounded to nearest
RANGE_RATE, SCALE_RATE = 1e-3, 1e-3  # learning rates of what is trained in logarithms; biases as scales


def train(
    layers: list[SoftLayer],
    items: list[Item],
    learning: Learning,
    loss: Callable[[Item, Callable[[], Tensor]], Tensor],
    draw: torch.Generator,
    drop: torch.Generator,
) -> None:
    """Train what layers have of roundings, ranges, scales and biases, for learning.steps steps of one item each.

    loss: (item, the penalty on soft codes) -> [], with gradients. draw: of the items' order, on the CPU. drop: what
    the loss draws from, on the layers' device.
    """
    codes = [layer.codes for layer in layers if layer.codes is not None]
    driven = [one for one in codes if one.driven]
    groups = _groups(layers, learning)
    tensors = [tensor for group, _, _ in groups for tensor in group]
    strength = torch.zeros(2, device=drop.device)  # of the penalty: its weight and its sharpness, which change

    def penalty() -> Tensor:
        if not driven:
            return strength.new_zeros(())
        weight, sharpness = strength
        return weight * torch.stack([one.penalty(sharpness) for one in driven]).mean()

    def gradients(item: Item) -> list[Tensor] | None:
        """Of one step's loss; None where none of the layers is called in these tuples."""
        found = loss(item, penalty)
        if not found.requires_grad:
            return None
        own = torch.autograd.grad(found, tensors, allow_unused=True)  # an expert may not be called
        return [torch.zeros_like(x) if one is None else one for one, x in zip(own, tensors, strict=True)]

    drawn = [drop] if learning.augmentation != "none" else []
    replay = Replay(gradients, drop.device, learning.steps / len(items), drawn)
    order: list[int] = []
    for step in range(learning.steps if groups else 0):
        order = order or torch.randperm(len(items), generator=draw).tolist()
        place = order.pop()
        if driven:
            strength.copy_(torch.tensor(_strength(step / learning.steps)))
        found = replay(place, items[place])
        if found is None:
            continue
        left = iter(found)
        for group, optimizer, rate in groups:
            move(optimizer, group, tuple(next(left) for _ in group), rate * falling(step, learning.steps))
        for one in codes:
            one.project()


def _groups(layers: list[SoftLayer], learning: Learning) -> list[tuple[list[Tensor], Any, float]]:
    """(what is trained, its optimizer, its learning rate), of roundings, of input ranges, and of the rest."""
    choice = OPTIMIZERS.find(learning.optimizer)
    roundings = [layer.codes.value for layer in layers if layer.codes is not None]
    ranges = [end for layer in layers for end in layer.input.ends]
    others = [one for layer in layers for one in layer.others()]
    chosen = (
        (roundings, choice.make, learning.rate),
        (ranges, torch.optim.Adam, RANGE_RATE),
        (others, torch.optim.Adam, SCALE_RATE),
    )
    return [(tensors, make(tensors, lr=rate), rate) for tensors, make, rate in chosen if tensors]


def _strength(done: float) -> tuple[float, float]:
    """(the weight of the penalty, its sharpness) when a share of the steps is done."""
    if done < WARM_UP:
        return 0.0, SHARPNESS[0]
    left = 1 - (done - WARM_UP) / (1 - WARM_UP)
    return PENALTY, SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * left
