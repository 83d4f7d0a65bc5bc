"""Searches over ranges, for objectives: scales of weights one by one, both ends of an input's range together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import InputValues
from .weights import WeightRows

WEIGHT_STEPS = 50  # from the least range to the whole
TIE = 1 + 1e-12  # float64 sums differ by less between devices and numbers of threads: no choice may hang on it


def least_of(
    rows: WeightRows, error: Callable[[Tensor], Tensor], low: float = 0.5, steps: int = WEIGHT_STEPS
) -> Tensor:
    """Scales [R], from `low` of the full range to the whole, each of the least error(scales [R]) -> [R] float64.

    The widest of those that are as good as each other, so that the same weight gets the same scales everywhere.
    """
    best, least = rows.full.clone(), torch.full_like(rows.full, float("inf"), dtype=torch.float64)
    whole = round(steps / (1 - low))
    for step in range(whole - steps, whole + 1):
        scale = rows.full * (step / whole)
        found = error(scale)
        better = found <= least * TIE
        best, least = torch.where(better, scale, best), torch.where(better, found, least)
    return best


def ranges_of(inputs: InputValues, steps: int) -> list[tuple[float, float]]:
    """(low, high) of all ranges whose ends are fractions of the full one; of symmetric grids, one for both."""
    fractions = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    low, high = inputs.low, inputs.high
    lows = fractions if low < 0 and not inputs.symmetric else fractions[-1:]
    highs = fractions if high > 0 or inputs.symmetric else fractions[-1:]
    bound = max(-low, high)
    ends = [(-bound * b, bound * b) if inputs.symmetric else (low * a, high * b) for a in lows for b in highs]
    return [(float(a), float(b)) for a, b in ends]
