"""Scales after rounding: sums of sign planes fitted to what the layer puts out, no longer to its weight.

For each row w of a weight, with M = X^T X + d mean(diag X^T X) I of the rows X that the layer is fed:

    scales    least (w - v)^T M (w - v), v = sum_i alpha_i b_i + z of each group: least squares in all scales and
              offsets of a row together, given the signs
    codes     one input after the other takes the value that is best while the others stay, two times through: once
              from the codes at hand, once from those of gptq on the new scales; a row takes the better

in turns, scales at the end once more. No step raises the error, but for scales stored in 16 bits; each row keeps the
best that it had. Alternating
rounds are those of LUT-GEMM (arXiv:2206.09557, section 3.1), which counts errors of weights; that they count in M,
with an offset for each group, is our addition. d is less than gptq's, by our measurement.

A plane is one group's, and its zeros elsewhere are never written: M meets it in the columns of that group only. Of
the matrix of scales one triangle is worked out. Errors and scales are of float64; codes are chosen in float32, in
blocks of inputs, whose changes reach the inputs to come in one product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..evidence import LayerEvidence
from ..kernels.formats.bcq import BinaryGrid, signs
from .gptq import ordered_factor

DAMPING = 1e-4
RIDGE = 1e-8  # of the mean of a row's own matrix: planes that are alike have a solution, too
SWEEPS = 2  # through all inputs, of a round
BLOCK = 64  # inputs whose changes reach the others together
CHUNK = 1 << 25  # numbers that are worked on at a time


class Task(NamedTuple):
    """What all rows of a layer share: M [K, K] float64; inputs in the order of their choice [K], M in this order
    float32, and gptq's factor."""

    metric: Tensor
    order: Tensor
    ordered: Tensor
    upper: Tensor


def refitted(
    weight: Tensor, codes: Tensor, grid: BinaryGrid, evidence: LayerEvidence, rounds: int
) -> tuple[Tensor, BinaryGrid]:
    """(codes int8 [N, K], their grid in the same dtype) of weight [N, K] float32, from codes on a grid with offsets.

    In the metric M no row's error is above that of the start. Raises UserError where the inputs hold NaN or infinity.
    """
    metric = _metric(evidence.hessian)
    order, upper = ordered_factor(evidence.hessian, weight.dtype)
    task = Task(metric, order, metric.float()[order][:, order], upper)
    (outputs, inputs), planes = weight.shape, grid.bits + 1
    step = max(1, CHUNK // (planes * max(2 * inputs, planes * grid.alphas.shape[1] ** 2)))
    parts = []
    for start in range(0, outputs, step):
        chosen = slice(start, start + step)
        rows = weight[chosen], codes[chosen], grid.rows(chosen)
        parts.append(_refitted(*rows, task, rounds))
    return torch.cat([part for part, _ in parts]), BinaryGrid.stacked([part for _, part in parts])


def output_error(weight: Tensor, values: Tensor, metric: Tensor) -> Tensor:
    """(w - v)^T M (w - v) of each row, float64 [N]."""
    return _error(weight, values, metric)[0]


def _error(weight: Tensor, values: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """(the error of each row [N], half its slope M (w - v) [N, K]), float64."""
    left = (weight - values).double()
    slope = left @ metric
    return (slope * left).sum(1), slope


def _metric(hessian: Tensor) -> Tensor:
    """M, float64 [K, K]."""
    if not hessian.isfinite().all():
        raise UserError("a layer's inputs hold NaN or infinity: no rounding fits them; calibrate anew.")
    mean = float(hessian.diagonal().mean()) or 1.0
    return hessian + DAMPING * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def _refitted(weight: Tensor, codes: Tensor, grid: BinaryGrid, task: Task, rounds: int) -> tuple[Tensor, BinaryGrid]:
    kind = grid.alphas.dtype
    least, slope = _error(weight, grid.values(codes), task.metric)
    best, kept = codes, grid
    for turn in range(rounds + (rounds > 0)):
        codes, grid = _scales(slope, codes, grid, task.metric)
        grid = BinaryGrid(grid.alphas.to(kind), grid.offsets.to(kind))
        if turn < rounds:
            anew = _descent(weight, _anew(weight, grid, task), grid, task)
            codes = _descent(weight, codes, grid, task)
        error, slope = _error(weight, grid.values(codes), task.metric)
        if turn < rounds:
            other, other_slope = _error(weight, grid.values(anew), task.metric)
            better = (other < error)[:, None]
            codes, slope = torch.where(better, anew, codes), torch.where(better, other_slope, slope)
            error = error.minimum(other)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better[:, None], codes, best)
        kept = BinaryGrid(
            torch.where(better[:, None, None], grid.alphas, kept.alphas),
            torch.where(better[:, None], grid.offsets, kept.offsets),
        )
    return best, kept


def _scales(slope: Tensor, codes: Tensor, grid: BinaryGrid, metric: Tensor) -> tuple[Tensor, BinaryGrid]:
    """The best scales and offsets of all groups of a row, given its signs, from the slope of those it has. A plane
    whose scale would be negative is the plane of the other signs: codes change with it."""
    (count, inputs), groups = codes.shape, grid.alphas.shape[1]
    size = inputs // groups
    signed = signs(codes.view(count, groups, size), grid.bits).double()
    basis = torch.cat([signed, torch.ones_like(signed[..., :1])], -1).transpose(2, 3).contiguous()
    gram = _gram(basis, metric)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None])
    wanted = (basis * slope.view(count, groups, 1, size)).sum(-1).view(count, -1, 1)
    change = torch.cholesky_solve(wanted, torch.linalg.cholesky(gram)).view(count, groups, -1)
    alphas = (grid.alphas + change[..., :-1]).float()
    turned = ((alphas < 0).int() << torch.arange(grid.bits, device=codes.device)).sum(-1).to(torch.int8)
    codes = (codes.view(count, groups, size) ^ turned[..., None]).flatten(1)
    return codes, BinaryGrid(alphas.abs(), (grid.offsets + change[..., -1]).float())


def _gram(basis: Tensor, metric: Tensor) -> Tensor:
    """B^T M B of each row [N, G P, G P], both float64, of planes [N, G, P, size], which are a group's only: the lower
    triangle of its blocks, all that a Cholesky factor asks for."""
    count, groups, planes, size = basis.shape
    gram = basis.new_zeros(count, groups, planes, groups, planes)
    for group in range(groups):
        mine = slice(group * size, (group + 1) * size)
        seen = basis[:, group].reshape(-1, size) @ metric[mine, : mine.stop]
        for other, part in enumerate(seen.view(count, planes, -1).split(size, 2)):
            gram[:, group, :, other] = part @ basis[:, other].transpose(1, 2)
    return gram.view(count, groups * planes, groups * planes)


class Choices:
    """The values that inputs can take under a grid, of all rows at once; inputs in the order `order`."""

    def __init__(self, grid: BinaryGrid, order: Tensor) -> None:
        sums, kinds = grid.sums().transpose(0, 1).sort(stable=True)  # [G, N, 2^q]
        self.sums, self.kinds, self.groups = sums.contiguous(), kinds, order // (len(order) // len(sums))
        self.middles = ((sums[..., 1:] + sums[..., :-1]) / 2).contiguous()
        self.group, self.order = self.groups.tolist(), order

    def nearest(self, wanted: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """(place among the sums, value) that is nearest to what a column wants [N]."""
        group = self.group[column]
        place = torch.searchsorted(self.middles[group], wanted[:, None])
        return place[:, 0], self.sums[group].gather(1, place)[:, 0]

    def places(self, codes: Tensor) -> Tensor:
        """Codes [N, K] as places [K, N]."""
        return self.kinds.argsort()[self.groups].gather(2, codes.T[self.order, :, None].long())[..., 0]

    def codes(self, places: Tensor) -> Tensor:
        """The inverse of `places`: int8."""
        codes = torch.empty(places.shape[::-1], dtype=torch.int8, device=places.device)
        codes[:, self.order] = self.kinds[self.groups].gather(2, places[..., None])[..., 0].T.to(torch.int8)
        return codes


def _anew(weight: Tensor, grid: BinaryGrid, task: Task) -> Tensor:
    """The codes of gptq: each input's rounding error is made up for by those after it."""
    choices, upper = Choices(grid, task.order), task.upper
    work = weight[:, task.order].T.contiguous()
    places = torch.empty_like(work, dtype=torch.int64)
    for start in range(0, len(work), BLOCK):
        block = slice(start, min(start + BLOCK, len(work)))
        inner, errors = upper[block, block], torch.empty_like(work[block])
        for j, column in enumerate(range(block.start, block.stop)):
            places[column], value = choices.nearest(work[column], column)
            errors[j] = (work[column] - value) / inner[j, j]
            work[column + 1 : block.stop].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        work[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
    return choices.codes(places)


def _descent(weight: Tensor, codes: Tensor, grid: BinaryGrid, task: Task) -> Tensor:
    """Codes of less error: each input in turn, the one that weighs most first, given all others."""
    order, ordered, choices = task.order, task.ordered, Choices(grid, task.order)
    weight, values = weight[:, order].T.contiguous(), grid.values(codes)[:, order].T.contiguous()
    places, weights = choices.places(codes), ordered.diagonal()[:, None]
    for _ in range(SWEEPS):
        slope, before = ordered @ (weight - values), places.clone()
        for start in range(0, len(order), BLOCK):
            block = slice(start, min(start + BLOCK, len(order)))
            better, old = values[block] + slope[block] / weights[block], values[block].clone()
            shares = ordered[block, block] / weights[block]
            for j, column in enumerate(range(block.start, block.stop)):
                places[column], value = choices.nearest(better[j], column)
                better[j + 1 :].addr_(shares[j + 1 :, j], value - values[column], alpha=-1)
                values[column] = value
            slope[block.stop :].addmm_(ordered[block.stop :, block], old - values[block])
        if torch.equal(places, before):
            break
    return choices.codes(places)
