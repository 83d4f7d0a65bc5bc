"""Optimizers of rounding, with the learning rate that each was found best with here.

python scripts/comparisons/compare_gradptq.py --stage lr
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..registry import Registry

OPTIMIZERS: Registry = Registry("optimizer")


@dataclass(frozen=True)
class Choice:
    """make: (tensors, lr) -> a torch optimizer. learning_rate: in codes of a weight per step, for most."""

    make: Callable[..., Any]
    learning_rate: float


class SignSGD(torch.optim.Optimizer):
    """x <- x - lr sign(gradient)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    x.add_(x.grad.sign(), alpha=-group["lr"])


OPTIMIZERS["adam"] = Choice(torch.optim.Adam, 1e-3)
OPTIMIZERS["adamw"] = Choice(torch.optim.AdamW, 1e-3)
OPTIMIZERS["adamax"] = Choice(torch.optim.Adamax, 3e-3)
OPTIMIZERS["signsgd"] = Choice(SignSGD, 1e-3)
OPTIMIZERS["sgd"] = Choice(partial(torch.optim.SGD, momentum=0.9), 1.0)


def falling(step: int, steps: int) -> float:
    """The share of the learning rate at a step: half a cosine, from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def move(optimizer: Any, tensors: list[Tensor], gradients: tuple[Tensor, ...], lr: float) -> None:
    """One step along gradients that nobody else sees: the tensors' own `grad` is empty before and after."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    optimizer.step()
    for tensor in tensors:
        tensor.grad = None
