"""L1 normalization on codes, forward and backward, as autograd sees it; kernels/shift/l1_formula.py has the formula.

    y = gamma (x - mean x) / (c mean |x - mean x|) + beta,   c = sqrt(pi / 2)

Of Gaussian values c mean |x - m| is the standard deviation, so that a model trained with GroupNorm or LayerNorm keeps
nearly its function. A transformer's tokens have channels far out, and c is greater: `ratios` of norms.py measures it
for each norm.

"Towards Accurate and Efficient Sub-8-Bit Integer Training" (arXiv:2411.10948) replaces the norm and quantizes it.
Our assumptions: c, measured or not; codes of 8 bits with a step for each normalized group, for nothing is summed
beyond one; eps as a floor of D, which changes no group above it. Gradients by gamma and beta are float32 sums over
groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...kernels.shift.l1 import shift_l1_gradient, shift_l1_norm
from .fused import new_seed

RATIO = math.sqrt(math.pi / 2)


class L1Norm(torch.autograd.Function):
    """x [R, P, C] float, normalized over P and each of so many groups of C; gamma, beta [C] float, both or neither ->
    x's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, number: int, eps: float, ratio: float
    ) -> Tensor:
        y, codes, stats = shift_l1_norm(x, gamma, beta, number, eps, ratio)
        ctx.save_for_backward(codes, stats, gamma)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        codes, stats, gamma = ctx.saved_tensors
        (dy,) = gradients
        dx, sums = shift_l1_gradient(dy, codes, stats, gamma, new_seed(dy.device))
        if gamma is None:
            return dx, None, None, None, None, None
        return dx, *sums.to(gamma.dtype), None, None, None
