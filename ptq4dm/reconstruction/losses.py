"""How wrong a block's outputs are: the first loss of its training.

    mse        mean w_r (y - t)^2                  fisher     mean w_r g^2 (y - t)^2
    cosine     mean w_r (1 - cos(y_r, t_r))        relative   mean w_r |y_r - t_r|^2 / |t_r|^2

r is a row, one calibration tuple; w_r its weight by its time; g the gradient of the model's answer in each output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.calls import Calls
from ..calibration.measure import timestep_bins


def row_weights(calls: Calls, weights: tuple[float, ...], device: torch.device) -> Tensor:
    """[R] float32: each unit's weight by its time. weights: of equal parts of the range; their mean becomes 1."""
    if not weights:
        return torch.ones(len(calls), device=device)
    parts = timestep_bins(calls.time, len(weights))
    chosen = torch.tensor(weights, dtype=torch.float32)
    return (chosen[parts] / chosen.mean()).to(device)


def block_loss(
    kind: str, outputs: list[Tensor], targets: list[Tensor], weights: Tensor, fisher: list[Tensor] | None = None
) -> Tensor:
    """The loss of a block's outputs against its targets, [] float32. weights: [R], see `row_weights`."""
    total = torch.zeros((), device=weights.device)
    for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        y, t = _by_row(output.float(), len(weights)), _by_row(target.float(), len(weights))
        w = weights if len(y) == len(weights) else weights.mean()[None]
        if kind == "cosine":
            row = 1 - torch.nn.functional.cosine_similarity(y, t, dim=1)
        elif kind == "relative":
            row = (y - t).square().sum(1) / t.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        else:
            wrong = (y - t).square()
            if kind == "fisher" and fisher is not None:
                wrong = wrong * _by_row(fisher[i], len(weights))
            row = wrong.mean(1)
        total = total + (w * row).mean()
    return total


def _by_row(x: Tensor, rows: int) -> Tensor:
    """[R, ...] where the first axis has the rows, or each row's several times in turn; else [1, ...]."""
    return x.reshape(rows, -1) if x.ndim and x.shape[0] % rows == 0 else x.reshape(1, -1)
