"""No gradient through a formula in torch that rounds: it would be that of another function.

Rounding has gradient zero almost everywhere, so autograd would keep the branch and the bias and lose the product of
codes, without a word. The ops refuse a backward pass for the same reason (kernels/runtime/ops.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *args: Any) -> Tensor:
        ctx.name = function.__name__
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name} rounds its inputs: quantized layers have no gradient. Call them under torch.no_grad(), or "
            "train the layers of the original model."
        )


def without_gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator: the function of tensors and more as it is, but for a backward pass, which is a RuntimeError."""

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return _NoGradient.apply(function, *args)
        return function(*args)

    return call
