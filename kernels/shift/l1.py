"""The ops of L1 normalization on codes (l1_formula.py), and what runs them.

l1_groups.py and l1_rows.py on a GPU; cpu/l1.cpp; the formula, operation by operation, where there is neither.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cpu import l1 as compiled
from ..formats.shift import TERMS
from ..runtime.late import late
from ..runtime.ops import op
from .l1_formula import STATS, gradient, normalized
from .noise import noise_of

if TYPE_CHECKING:
    from . import l1_groups, l1_rows
else:
    late(globals(), "l1_groups", "l1_rows")

WIDEST = 8192  # values of one pixel in a group, or of a token: what a kernel has at once


@op
def shift_l1_norm(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, number: int, eps: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, P, C] float -> (y of x's dtype, codes int8 [R, P, C], stats float32 [5, R, number]).

    Normalized over P and each of `number` groups of C; gamma and beta [C] float, both or neither; ratio: c.

    Raises ValueError for groups whose integer sums may pass an int32.
    """
    if x.shape[1] * (x.shape[2] // number) > TERMS:
        raise ValueError(f"sums over {x.shape[1]} x {x.shape[2] // number} codes of 8 bits may pass an int32.")
    if (kernels := kernels_for(x, number)) is not None:
        return kernels.normalize(x.contiguous(), gamma, beta, number, math.sqrt(eps), ratio)
    return normalized(x, gamma, beta, number, eps, ratio)


@shift_l1_norm.register_fake
def _(x, gamma, beta, number, eps, ratio):
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, like.to(torch.int8), x.new_empty(STATS, len(x), number, dtype=torch.float32)


@op
def shift_l1_gradient(
    dy: Tensor, codes: Tensor, stats: Tensor, gamma: Tensor | None, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """dy [R, P, C] float, codes and stats of the forward pass, seed int64 [] of the rounding
    -> (dx of dy's dtype, by gamma and by beta float32 [2, C], zeros without gamma)."""
    if (kernels := kernels_for(dy, stats.shape[2])) is not None:
        return kernels.gradient(dy.contiguous(), codes, stats, gamma, seed)
    return gradient(dy, codes, stats, gamma, noise_of(seed, dy.numel()).view(dy.shape))


@shift_l1_gradient.register_fake
def _(dy, codes, stats, gamma, seed):
    sums = dy.new_empty(2, dy.shape[2], dtype=torch.float32)
    return torch.empty_like(dy, memory_format=torch.contiguous_format), sums


def kernels_for(x: Tensor, number: int) -> Any:
    """The module whose kernels serve x [R, P, C] in so many groups; None: the formulas, operation by operation."""
    if x.is_cuda and x.shape[2] // number <= WIDEST:
        return l1_rows if x.shape[1] == number == 1 else l1_groups
    return compiled if x.numel() and compiled.serves(x.device) else None
