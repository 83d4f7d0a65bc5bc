"""Hessian rounding: each column's rounding error is made up for by the columns still to come.

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", Frantar et al., arXiv:2210.17323,
with columns in the order of falling Hessian diagonal and group scales that are fixed beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..evidence import LayerEvidence
from ..kernels.formats.grid import Fp8Grid, Grid
from ..kernels.formats.power import PowerGrid
from .registry import register_rounder

BLOCK = 128
DAMPING = 0.01  # at first; then ten times as much until the Hessian has an inverse
MOST_DAMPING = 1e9


@register_rounder("gptq", needs=frozenset({"rows"}))
def gptq(weight: Tensor, grid: Grid | Fp8Grid | PowerGrid, evidence: LayerEvidence) -> Tensor:
    """Codes [N, K] of weight [N, K] float32 on the grid, least in ||X (W - Q)^T|| for the rows X of the evidence.

    Raises UserError where the rows hold NaN or infinity.
    """
    columns = weight.shape[1]
    order, upper = ordered_factor(evidence.hessian, weight.dtype)
    work, grid_of = weight[:, order].clone(), grid.columns(order)
    values = torch.empty_like(work)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        values[:, start:end], errors = _rounded(work[:, start:end], grid_of, start, upper[start:end, start:end])
        work[:, end:].sub_(errors @ upper[start:end, end:])
    result = torch.empty_like(values)
    result[:, order] = values
    return grid.codes(result)  # of values that are on the grid: exact


def _rounded(part: Tensor, grid: Grid | Fp8Grid | PowerGrid, first: int, upper: Tensor) -> tuple[Tensor, Tensor]:
    """(values [N, B], errors [N, B]) of columns of the weight, the first of which is `first`; upper: [B, B].

    On a GPU the time is that of launching: hundreds of thousands of columns, of 8 small kernels each. So columns lie
    as rows, which are taken apart at once, and results are put together at the end of the block.
    """
    rest = part.T.contiguous()
    errors, values = torch.empty_like(rest), []
    rows = zip(rest.unbind(), errors.unbind(), upper.diagonal().unbind(), upper[:, :, None].unbind(), strict=True)
    for j, (column, error, pivot, later) in enumerate(rows):
        values.append(grid.nearest(column, first + j))
        torch.div(column - values[j], pivot, out=error)
        rest[j + 1 :].sub_(later[j + 1 :] * error)  # -= would copy it onto itself
    return torch.stack(values, 1), errors.T.contiguous()


def ordered_factor(hessian: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the columns in the order of their rounding [K], the factor of the inverse Hessian in this order [K, K])."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return order, _inverse_factor(hessian[order][:, order]).to(dtype)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, with as much damping as it needs."""
    mean = float(hessian.diagonal().mean()) or 1.0
    damping = DAMPING
    while damping < MOST_DAMPING:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return factor
        damping *= 10
    raise UserError("a layer's inputs hold NaN or infinity: no rounding fits them; calibrate anew.")
