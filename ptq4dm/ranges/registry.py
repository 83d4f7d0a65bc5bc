"""The slot of range objectives: how far a grid reaches when the largest value need not be on it.

An objective is a class of functions without state:

    check(value) -> value                           its parameter, checked; left out where there is none
    weight(rows, parameter, evidence) -> [R]        scales for a WeightRows (weights.py), one for each of its rows
    input(inputs, parameter, evidence) -> grid      (scale, zero point) for an InputValues (inputs.py)
    targets(predictions) -> predictions             what predictions are compared with; left out: the exact ones

`evidence` is a LayerEvidence, or None for objectives without `needs`; of those that need the model, weights get none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..registry import Registry

OBJECTIVES: Registry = Registry("objective")


def register_objective(name: str, parameter: float | None = None, needs: frozenset[str] = frozenset()) -> Callable:
    """Return a class decorator that makes an objective known under a name.

    parameter: the default of its parameter; None for an objective without one.
    needs: "rows", if it looks at what the layer is fed; "model", if grids of inputs are judged by the prediction of
        the whole model.
    """

    def add(objective: Any) -> Any:
        objective.parameter, objective.needs = parameter, frozenset(needs)
        return OBJECTIVES.add(name, objective)

    return add


def weights_need(objective: str) -> frozenset[str]:
    """The evidence that an objective looks at for scales of weights: the model is asked for inputs alone."""
    return OBJECTIVES.find(objective).needs - {"model"}


def objective_parameter(objective: str, value: float | None = None) -> float | None:
    """The objective's parameter, checked; None stands for the default."""
    found = OBJECTIVES.find(objective)
    if value is None or not hasattr(found, "check"):
        return found.parameter
    return float(found.check(value))


def positive(value: float, what: str) -> float:
    """The value, if it is positive and finite; else UserError."""
    if not 0 < value < float("inf"):
        raise UserError(f"{what} is positive and finite; got {value}.")
    return value
