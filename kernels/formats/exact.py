"""Arithmetic that gives the same bits on a CPU and on a GPU: the grids of weights are made with it."""

from __future__ import annotations

import torch
from torch import Tensor


def over(values: Tensor, number: float) -> Tensor:
    """values / number, rounded once. On a GPU torch multiplies by 1 / number instead, which rounds twice."""
    return values / torch.full((), number, dtype=values.dtype, device=values.device)
