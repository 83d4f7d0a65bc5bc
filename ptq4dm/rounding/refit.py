"""Scales after rounding: sums of sign planes fitted to what the layer puts out, no longer to its weight.

For each row w of a weight, with M = X^T X + d mean(diag X^T X) I of the rows X that the layer is fed:

    scales    least (w - v)^T M (w - v), v = sum_i alpha_i b_i + z of each group: least squares in all scales and
              offsets of a row together, given the signs
    codes     one input after the other takes the value that is best while the others stay, two times through

in turns. No step raises the error, but for scales stored in 16 bits; each row keeps the best that it had. Alternating
rounds are those of LUT-GEMM (arXiv:2206.09557, section 3.1), which counts errors of weights; that they count in M,
with an offset for each group, is our addition. d is less than gptq's, by our measurement.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..evidence import LayerEvidence
from ..kernels.formats.bcq import BinaryGrid, signs

DAMPING = 0.001
RIDGE = 1e-6  # of the mean of a row's own matrix: planes that are alike have a solution, too
SWEEPS = 2  # through all inputs, of a round
CHUNK = 1 << 24  # numbers that are worked on at a time


def refitted(
    weight: Tensor, codes: Tensor, grid: BinaryGrid, evidence: LayerEvidence, rounds: int
) -> tuple[Tensor, BinaryGrid]:
    """(codes int8 [N, K], their grid in the same dtype) of weight [N, K] float32, from codes on a grid with offsets.

    In the metric M no row's error is above that of the start. Raises UserError where the inputs hold NaN or infinity.
    """
    metric = _metric(evidence.hessian)
    outputs, inputs = weight.shape
    wide = inputs * grid.alphas.shape[1] * (grid.bits + 1)
    parts = []
    for start in range(0, outputs, max(1, CHUNK // wide)):
        chosen = slice(start, start + max(1, CHUNK // wide))
        parts.append(_refitted(weight[chosen], codes[chosen], grid.rows(chosen), metric, rounds))
    return torch.cat([part for part, _ in parts]), BinaryGrid.stacked([part for _, part in parts])


def output_error(weight: Tensor, values: Tensor, metric: Tensor) -> Tensor:
    """(w - v)^T M (w - v) of each row, float64 [N]."""
    left = (weight - values).double()
    return ((left @ metric) * left).sum(1)


def _metric(hessian: Tensor) -> Tensor:
    """M, float64 [K, K]."""
    if not hessian.isfinite().all():
        raise UserError("a layer's inputs hold NaN or infinity: no rounding fits them; calibrate anew.")
    mean = float(hessian.diagonal().mean()) or 1.0
    return hessian + DAMPING * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def _refitted(
    weight: Tensor, codes: Tensor, grid: BinaryGrid, metric: Tensor, rounds: int
) -> tuple[Tensor, BinaryGrid]:
    kind = grid.alphas.dtype
    least, best, kept = output_error(weight, grid.values(codes), metric), codes, grid
    for _ in range(rounds):
        codes, grid = _scales(weight, codes, grid, metric)
        grid = BinaryGrid(grid.alphas.to(kind), grid.offsets.to(kind))
        codes = _descent(weight, codes, grid, metric)
        error = output_error(weight, grid.values(codes), metric)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better[:, None], codes, best)
        kept = BinaryGrid(
            torch.where(better[:, None, None], grid.alphas, kept.alphas),
            torch.where(better[:, None], grid.offsets, kept.offsets),
        )
    return best, kept


def _scales(weight: Tensor, codes: Tensor, grid: BinaryGrid, metric: Tensor) -> tuple[Tensor, BinaryGrid]:
    """The best scales and offsets of all groups of a row, given its signs. A plane whose scale would be negative is
    the plane of the other signs: codes change with it."""
    (count, inputs), groups, planes = weight.shape, grid.alphas.shape[1], grid.bits + 1
    size = inputs // groups
    signed = signs(codes.view(count, groups, size), grid.bits).double()
    signed = torch.cat([signed, torch.ones_like(signed[..., :1])], -1)
    basis = signed.new_zeros(count, groups, size, groups, planes)
    basis.diagonal(dim1=1, dim2=3).copy_(signed.permute(0, 2, 3, 1))
    basis = basis.view(count, inputs, groups * planes)
    seen = metric @ basis
    gram = basis.transpose(1, 2) @ seen
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    found = torch.linalg.solve(gram, seen.transpose(1, 2) @ weight.double()[..., None])
    found = found.view(count, groups, planes).float()
    alphas, offsets = found[..., :-1], found[..., -1]
    turned = ((alphas < 0).int() << torch.arange(grid.bits, device=codes.device)).sum(-1).to(torch.int8)
    codes = (codes.view(count, groups, size) ^ turned[..., None]).flatten(1)
    return codes, BinaryGrid(alphas.abs(), offsets)


def _descent(weight: Tensor, codes: Tensor, grid: BinaryGrid, metric: Tensor) -> Tensor:
    """Codes of less error: each input in turn, the one that weighs most first, given all others."""
    sums, size = grid.sums(), weight.shape[1] // grid.alphas.shape[1]
    values, codes, matrix = grid.values(codes), codes.clone(), metric.float()
    order = matrix.diagonal().argsort(descending=True, stable=True).tolist()
    for _ in range(SWEEPS):
        slope, before = (weight - values) @ matrix, codes.clone()
        for column in order:
            choices = sums[:, column // size]
            wanted = values[:, column] + slope[:, column] / matrix[column, column]
            place = (choices - wanted[:, None]).abs().argmin(1, keepdim=True)
            value = choices.gather(1, place)[:, 0]
            slope.addr_(value - values[:, column], matrix[column], alpha=-1)
            values[:, column], codes[:, column] = value, place[:, 0].to(torch.int8)
        if torch.equal(codes, before):
            break
    return codes
