"""Quantize the layers that share one input: smooth, split off the low-rank branch, round the rest.

SVDQuant (arXiv:2411.05007) as its authors run it. With X~ = (X + c) / s and W~ = W diag(s):

    1. choose s:     the candidate whose quantized layers disturb the output least
    2. split         W~ = L + R,  L = SVD_r(W~ - Q(R)), R = W~ - L, in turn while the output error falls
    3. round         R to 4 bits, to nearest or with GPTQ

Of a plan that rotates, all of it is rotated: weight, rows, and the branch's `down`.

With subspace "inputs" the branch holds the r directions D in which inputs are largest (their principal components,
about 0) instead, in the precision of the branch, and 4 bits hold the rest of both operands; in floats it is exact for
any D and V = W D^T:

    W x = R (I - D^T D) x + U D x,    R = W - V D,  U = V + V (I - D D^T)

That a subspace of the inputs is kept is of "DiRotQ" (arXiv:2605.16732), which rotates into the whole basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibration.evidence import squared_error
from ..evidence import LayerEvidence
from ..kernels.formats.grid import Grid
from ..kernels.formats.int4 import dequantize_groups, quantize_groups
from ..kernels.w4.reference import round_activation
from ..rounding.registry import ROUNDERS
from ..transforms.smooth import candidates, divisors
from .layers.lowrank import top_factors
from .layers.plan import SVDQPlan

SEARCH_ROWS = 1024
FINALISTS = 3


@dataclass
class Group:
    """weight: [N, K] float32, the layers' weights stacked; rows: [R, K] float32 inputs; peak: [K] largest |input|.

    subspace: D [r, K] as it is stored, where the branch holds directions of the inputs.
    """

    weight: Tensor
    rows: Tensor
    peak: Tensor
    plan: SVDQPlan
    dtype: torch.dtype  # of scales, divisors and branch
    subspace: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, rows: Tensor, peak: Tensor, plan: SVDQPlan, dtype: torch.dtype) -> Group:
        """The group of a weight, rows and their peaks as layers have them."""
        if not (plan.rotation or plan.projects):
            return cls(weight, rows, peak, plan, dtype)
        weight, rows = plan.turned(weight), plan.turned(rows)
        subspace = plan.stored(top_factors(rows, plan.rank, plan.seed)[1], dtype) if plan.projects else None
        group = cls(weight, rows, peak, plan, dtype, subspace)
        group.peak = group.rest_of(rows).abs().amax(0)
        return group

    def rest_of(self, rows: Tensor) -> Tensor:
        """What is rounded of rows [R, K]."""
        return rows if self.subspace is None else rows - (rows @ self.subspace.T) @ self.subspace

    def smoothed_rest(self, up: Tensor | None, down: Tensor | None, smooth: Tensor) -> Tensor:
        """What is rounded of the weight [N, K], smoothed."""
        if self.subspace is not None:
            return (self.weight - (self.weight @ self.subspace.T) @ self.subspace) * smooth
        rest = self.weight * smooth
        return rest if up is None else rest - up @ (down * smooth)

    def divisors(self, alpha: float, beta: float) -> Tensor:
        """s [K] for the shifted input, as stored."""
        if self.plan.activation == "none":
            return torch.ones_like(self.peak)
        s = divisors(self.peak + self.plan.shift, self.weight.abs().amax(0), alpha, beta)
        return s.to(self.dtype).float()


@dataclass
class Decomposition:
    """A group's result.

    codes [N, K] int8, scales [N, K/G] float32; down [r, K], up [N, r] (they take inputs as they come), smooth [K].
    """

    codes: Tensor
    scales: Tensor
    down: Tensor | None
    up: Tensor | None
    smooth: Tensor

    def residual(self) -> Tensor:
        """[N, K] float32, for smoothed inputs."""
        return dequantize_groups(self.codes, self.scales)


def rounded_inputs(group: Group, smooth: Tensor, rows: Tensor) -> Tensor:
    """What the codes of rows [R, K] stand for, float32; the same for all splits under one `smooth`."""
    plan = group.plan
    return round_activation(
        (group.rest_of(rows) + plan.shift) / smooth, plan.activation, plan.group_size, bool(plan.shift)
    )


def output(group: Group, split: Decomposition, rows: Tensor, inputs: Tensor | None = None) -> Tensor:
    """What the quantized layers give on rows [R, K], without bias: [R, N]. inputs: their `rounded_inputs`."""
    inputs = rounded_inputs(group, split.smooth, rows) if inputs is None else inputs
    rest = split.residual()
    y = inputs @ rest.T
    if group.plan.shift:
        y = y - group.plan.shift * (rest / split.smooth).sum(1)
    return y if split.down is None else y + (rows @ split.down.T) @ split.up.T


def split_weight(group: Group, smooth: Tensor, residual: Tensor | None = None) -> Decomposition:
    """Branch and codes of the smoothed weight; `residual` is what 4 bits hold already (step 2), 0 at first."""
    plan, smoothed = group.plan, group.weight * smooth
    up = down = None
    if group.subspace is not None:
        down, held = group.subspace, group.weight @ group.subspace.T
        up = (held + held - held @ (down @ down.T)).to(group.dtype).float()
    elif plan.rank:
        up, down = top_factors(smoothed if residual is None else smoothed - residual, plan.rank, plan.seed)
        down = plan.stored(down / smooth, group.dtype)
        up = up.to(group.dtype).float()
    codes, scales = quantize_groups(group.smoothed_rest(up, down, smooth), plan.group_size, group.dtype)
    return Decomposition(codes, scales.float(), down, up, smooth)


def search(
    group: Group, exhaustive: bool, module_error: Callable[[Decomposition], float] | None
) -> tuple[float, float]:
    """(alpha, beta) of least error, that of the enclosing module where it is given.

    Exhaustive: every candidate of the authors' grid on it. Otherwise a grid half as fine is ranked by the layers' own
    outputs on SEARCH_ROWS rows, and the FINALISTS best by the module.
    """
    rows = group.rows if exhaustive else group.rows[:: max(1, len(group.rows) // SEARCH_ROWS)]
    exact = rows @ group.weight.T

    def row_error(split: Decomposition) -> float:
        return squared_error(output(group, split, rows), exact)

    def ranking(score: Callable[[Decomposition], float], choices: list) -> list:
        errors = [score(split_weight(group, group.divisors(*choice))) for choice in choices]
        return [choices[i] for i in sorted(range(len(choices)), key=lambda i: _least(errors[i]))]

    if exhaustive:
        return ranking(module_error or row_error, candidates(20))[0]
    ranked = ranking(row_error, candidates(10))
    if module_error is None:
        return ranked[0]
    return ranking(module_error, ranked[:FINALISTS])[0]


def refine(group: Group, smooth: Tensor, first: Decomposition | None = None) -> Decomposition:
    """Step 2: branch and rounded rest in turn, until the first time that the output error grows.

    first: what `split_weight` gives under this `smooth`, where it is known.
    """
    rows, inputs = group.rows, rounded_inputs(group, smooth, group.rows)
    exact = rows @ group.weight.T
    best = split_weight(group, smooth) if first is None else first
    least = squared_error(output(group, best, rows, inputs), exact)
    for _ in range(group.plan.refinements if group.plan.rank and group.subspace is None else 0):
        split = split_weight(group, smooth, residual=best.residual())
        error = squared_error(output(group, split, rows, inputs), exact)
        if error >= least:
            break
        best, least = split, error
    return best


def round_rest(group: Group, split: Decomposition) -> Decomposition:
    """Step 3: the codes of the rest, W~ minus the branch, under the scales that are there."""
    rest = group.smoothed_rest(split.up, split.down, split.smooth)
    # The bias takes back what the rounded weight makes of the shift: rounders see the unshifted inputs.
    rounder = ROUNDERS.find(group.plan.rounding)
    evidence = LayerEvidence(group.rest_of(group.rows) / split.smooth)
    return replace(split, codes=rounder(rest, Grid(split.scales, None, -7, 7), evidence))


def _least(error: float) -> float:
    """A key to sort by: what overflows is worst."""
    return error if error == error else float("inf")
