"""The range objective of PD-Quant, Liu et al. (arXiv 2212.07048): ranges of inputs by what the model predicts.

    inputs      argmin  of the error of the model's prediction, with the layer's input on the grid
    weights     as "mse": the paper chooses activation scales so, and says nothing of weights (our assumption)

The search starts at the best of what "mse", "lp" and "max" choose, and moves both ends of the range, then each in
turn, by factors that come closer and closer to 1 (our assumption: the paper names no search).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from ..evidence import LayerEvidence
from .inputs import InputValues
from .registry import OBJECTIVES, objective_parameter, register_objective
from .search import TIE
from .weights import WeightRows

Grid = tuple[float, int]
STARTS = ("mse", "lp", "max")
FACTORS = ((0.6, 0.8, 1.25), (0.9, 1.1))  # turn by turn
SIDES = ((True, True), (False, True), (True, False))  # which ends are moved: both, high, low


@register_objective("prediction", needs=frozenset({"model"}))
class Prediction:
    """The least error of the model's prediction, `evidence.prediction(scale, zero point)`."""

    @staticmethod
    def weight(rows: WeightRows, parameter: None, evidence: LayerEvidence | None) -> Tensor:
        return OBJECTIVES.find("mse").weight(rows, objective_parameter("mse"), None)

    @staticmethod
    def input(inputs: InputValues, parameter: None, evidence: LayerEvidence) -> Grid:
        error = cast(Callable[[float, int], float], evidence.prediction)  # where the model is asked, there is one
        best, least = (1.0, 0), float("inf")
        for start in starts_of(inputs):
            if (found := error(*start)) * TIE < least:
                best, least = start, found
        for factors in FACTORS:
            for sides in SIDES[:1] if inputs.symmetric else SIDES:
                for grid in moved(inputs, best, factors, sides):
                    if (found := error(*grid)) * TIE < least:
                        best, least = grid, found
        return best


def starts_of(inputs: InputValues) -> list[Grid]:
    """The grids that objectives of the values alone choose."""
    return [OBJECTIVES.find(name).input(inputs, objective_parameter(name), None) for name in STARTS]


def moved(inputs: InputValues, grid: Grid, factors: tuple[float, ...], sides: tuple[bool, bool]) -> list[Grid]:
    """Grids whose ends are those of a grid times factors, but not beyond all values. sides: which of (low, high)."""
    (scale, zero), half = grid, 2 ** (inputs.bits - 1)
    bottom, top = inputs.low, inputs.high
    if inputs.symmetric:
        bottom, top = min(bottom, -top), max(-bottom, top)
    low, high = max((-half - zero) * scale, bottom), min((half - 1 - zero) * scale, top)
    if inputs.symmetric:
        low = -high
    ends = [(low * f if sides[0] else low, high * f if sides[1] else high) for f in factors]
    return [inputs.grid(max(a, bottom), min(b, top)) for a, b in ends]
