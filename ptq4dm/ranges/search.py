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


def ranges_of(inputs: InputValues, steps: int) -> tuple[Tensor, Tensor]:
    """(lows [R], highs [R]), float64, of all ranges whose ends are fractions of the full one; of symmetric grids, one
    fraction for both."""
    fractions = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    low, high = inputs.low, inputs.high
    if inputs.symmetric:
        ends = max(-low, high) * fractions
        return -ends, ends
    lows, highs = (end * (fractions if end else fractions[-1:]) for end in (low, high))
    return lows.repeat_interleave(len(highs)), highs.repeat(len(lows))
