"""The low-rank branch from a weight alone, without any calibration input.

    W ~ L + R,    R on a 4-bit grid in groups,    L = up @ down of rank r

Branch and rounded rest take turns, as in svdquant/group.py, but are judged by the weight itself:

    R_0 = 0,    L_i = SVD_r(W - R_{i-1}),    R_i = Q(W - L_i),    until |W - L_i - R_i| falls no more

which minimises what is left of the weight and so, for inputs of which nothing is known, of the output. Each turn goes
on from the subspace of the turn before: one step of subspace iteration (Halko et al., arXiv:0909.4061, algorithm 4.4)
where a first decomposition takes several. That the result of the rounding comes back into the decomposition is
LoftQ's alternation (Li et al., arXiv:2310.08659, algorithm 1). No smoothing: it needs the inputs' peaks. Of a plan
that rotates inputs, the weight that comes here is rotated, and `down` is what rotated inputs are multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.evidence import squared_error
from ...kernels.formats.int4 import dequantize_groups, quantize_groups
from .lowrank import moved, top_factors
from .plan import SVDQPlan


@dataclass
class Split:
    """A weight's codes [N, K] int8 under scales [N, K/G]; its branch down [r, K], up [N, r], None for rank 0."""

    codes: Tensor
    scales: Tensor
    down: Tensor | None = None
    up: Tensor | None = None

    def residual(self) -> Tensor:
        """What the codes stand for, float32 [N, K]."""
        return dequantize_groups(self.codes, self.scales)

    def weight(self) -> Tensor:
        """All of it, float32 [N, K]."""
        return self.residual() if self.down is None else self.residual() + self.up.float() @ self.down.float()


@torch.no_grad()
def decompose(weight: Tensor, plan: SVDQPlan, dtype: torch.dtype) -> Split:
    """weight [N, K] float32 -> its codes and branch. dtype: of scales and branch, 16-bit floats."""
    if not plan.rank:
        return Split(*quantize_groups(weight, plan.group_size, dtype))
    factors = top_factors(weight, plan.rank, plan.seed)
    best = _rounded(weight, factors, plan, dtype)
    least = squared_error(weight, best.weight())
    for _ in range(plan.refinements):
        factors = moved(weight - best.residual(), factors[1])
        split = _rounded(weight, factors, plan, dtype)
        error = squared_error(weight, split.weight())
        if not error < least:
            break
        best, least = split, error
    return best


def _rounded(weight: Tensor, factors: tuple[Tensor, Tensor], plan: SVDQPlan, dtype: torch.dtype) -> Split:
    """The branch as it is stored, and the rest rounded to nearest."""
    up, down = factors[0].to(dtype), plan.stored(factors[1], dtype)
    return Split(*quantize_groups(weight - up.float() @ down, plan.group_size, dtype), down, up)
