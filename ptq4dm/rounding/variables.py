"""What is trained where a weight is rounded: codes as functions of a variable that gradients reach.

    p = w / s                                  where the weight lies between its codes
    floor(p) - k <= q <= floor(p) + 1 + k      the moves: up or down (k = 0), or wide (k = 2)

    sigmoid            q = floor(p) + h,  h = clip((1 + 2k + 0.2) sigmoid(V) - k - 0.1, -k, 1 + k)
    straight-through   q = round(U),      U starts at p, and its gradient passes the rounding
    division           q = round(p / exp(V)),      V starts at 0

sigmoid with k = 0 is AdaRound (arXiv:2004.10568): soft codes while it trains, driven to whole numbers by a penalty;
division is FlexRound's by elements (arXiv:2306.00317). Codes here are less their zero points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..registry import Registry

STRETCH = 0.1  # how far the sigmoid reaches beyond the moves, so that their ends are reached
WIDE = 2

VARIABLES: Registry = Registry("variable")


def register_variable(name: str) -> Callable:
    """Return a class decorator that makes a Variable known under a name."""
    return lambda variable: VARIABLES.add(name, variable)


def straight_through(x: Tensor) -> Tensor:
    """x rounded, halves to even, with the gradient of x."""
    return x + (x.detach().round() - x.detach())


class Variable:
    """Codes [N, K] that are trained. `value`: the trained tensor; `soft()`: codes with a gradient.

    steps: p [N, K] float32. low, high: the ends of the grid, broadcastable to it. wide: moves by more than one code.
    """

    paces: ClassVar[dict[str, float]] = {"gptq": 1.0, "nearest": 10.0}
    """Start -> its learning rate, in those of straight-through codes from gptq; from nearest these go farther."""

    driven: ClassVar[bool] = False
    """Whether a penalty drives soft codes to whole numbers."""

    def __init__(self, steps: Tensor, low: Tensor, high: Tensor, wide: bool = False) -> None:
        self.reach = WIDE if wide else 0
        steps = steps.maximum(low).minimum(high)
        self.floor = steps.floor()
        self.low = (self.floor - self.reach).maximum(low)
        self.high = (self.floor + 1 + self.reach).minimum(high)
        self.value = self.start(steps).requires_grad_()

    def start(self, steps: Tensor) -> Tensor:
        raise NotImplementedError

    def soft(self) -> Tensor:
        raise NotImplementedError

    def hard(self) -> Tensor:
        """The codes that training came to, whole numbers in float32."""
        return self.soft().detach().round()

    def penalty(self, sharpness: Tensor) -> Tensor:
        """How far the soft codes are from whole numbers, 0 to 1."""
        raise NotImplementedError

    def project(self) -> None:
        """Bring the variable back to where codes can be."""


@register_variable("sigmoid")
class Sigmoid(Variable):
    """AdaRound's rectified sigmoid."""

    paces: ClassVar[dict[str, float]] = {"gptq": 300.0, "nearest": 300.0}
    driven: ClassVar[bool] = True

    @property
    def span(self) -> float:
        return 1 + 2 * self.reach + 2 * STRETCH

    def start(self, steps: Tensor) -> Tensor:
        return torch.logit((steps - self.floor + self.reach + STRETCH) / self.span)

    def _moves(self) -> Tensor:
        moves = torch.sigmoid(self.value) * self.span - self.reach - STRETCH
        return moves.clamp(-self.reach, 1 + self.reach)

    def soft(self) -> Tensor:
        return (self.floor + self._moves()).maximum(self.low).minimum(self.high)

    def hard(self) -> Tensor:
        moves = (self._moves().detach() + 0.5).floor()
        return (self.floor + moves).maximum(self.low).minimum(self.high)

    def penalty(self, sharpness: Tensor) -> Tensor:
        moves = self._moves()
        between = moves - moves.detach().floor()
        return (1 - (2 * between - 1).abs().pow(sharpness)).mean()


@register_variable("straight-through")
class StraightThrough(Variable):
    """The weight itself, in units of its scale."""

    def start(self, steps: Tensor) -> Tensor:
        return steps.clone()

    def soft(self) -> Tensor:
        return straight_through(self.value.maximum(self.low).minimum(self.high))

    @torch.no_grad()
    def project(self) -> None:
        self.value.copy_(self.value.maximum(self.low).minimum(self.high))


@register_variable("division")
class Division(Variable):
    """A divisor for each weight, which is rounded after it."""

    def start(self, steps: Tensor) -> Tensor:
        self.steps = steps  # within the grid's ends: beyond them no gradient would reach the divisor
        return torch.zeros_like(steps)

    def soft(self) -> Tensor:
        return straight_through((self.steps / self.value.exp()).maximum(self.low).minimum(self.high))
