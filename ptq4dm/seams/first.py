"""The first token of texts, where it is unlike the others: seen while the model runs, with what both hold.

A layer is looked at whose input has an axis of tokens, and whose first token's largest value is LARGER times that of
all others, or more, in every kind of call; a grid of its own serves where the noise of rounding falls by SAVED. That
first tokens are told so, by what they hold, and both numbers are our assumptions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..calibration.calls import Calls
from ..calibration.record import answers
from ..hooks import hooked, input_of
from ..layers.choices import as_plan_of
from ..layers.plan import LayerPlan
from ..layers.split.choices import MOST
from ..layers.split.first import FirstTokenPlan
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode
from ..ranges.registry import OBJECTIVES, objective_parameter
from .parts import SAVED, Histogram, PartedInput, part_grid, together

LARGER = 2.0


@dataclass(frozen=True)
class FirstToken:
    """The statistics of the first token of each text, and of all others."""

    first: Histogram
    others: Histogram


Found = PartedInput | FirstToken


@torch.no_grad()
def with_first_tokens(model: nn.Module, views: list[LayerView], calls: Calls) -> list[str]:
    """The names of Linear layers whose first token is larger than all others by far.

    calls: one of each kind that the model is called with.
    """
    seen: dict[str, bool] = {}

    def noting(name: str) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            far = x.ndim == 3 and x.shape[1] > 1 and bool(_peak(x[:, :1]) >= LARGER * _peak(x[:, 1:]) > 0)
            seen[name] = seen.get(name, True) and far

        return note

    hooks = {view.name: noting(view.name) for view in views if isinstance(view.module, nn.Linear)}
    with evaluation_mode(model), hooked(model, hooks):
        for place in range(len(calls)):
            answers(model, calls[place : place + 1])
    return [name for name in hooks if seen.get(name)]


def _peak(x: Tensor) -> Tensor:
    return x.abs().amax()


def first_where_it_pays(plan: LayerPlan, view: LayerView, found: FirstToken, symmetric: bool) -> LayerPlan:
    """The plan of a layer with a grid for the first token; as it is where that saves too little, and of formats that
    have no such layer.

    Grids are those of the plan's objective; of one that looks at more than values, those of "mse".
    """
    if type(plan) is not LayerPlan or plan.format != "int8":
        return plan
    plain = replace(plan)
    if OBJECTIVES.find(plan.objective).needs:
        plain.objective, plain.objective_parameter = "mse", objective_parameter("mse")
    weight = view.weight.detach().float()
    first, others, whole = (
        part_grid(plain, part, symmetric, None, weight)[0]
        for part in (found.first, found.others, together((found.first, found.others)))
    )
    counts = [int(part[0].sum()) for part in (found.first, found.others)]
    if counts[0] * first**2 + counts[1] * others**2 > (1 - SAVED) * sum(counts) * whole**2:
        return plan
    made = as_plan_of(FirstTokenPlan, plan, first_factor=max(others / first, 1 / MOST))
    scale, zero = part_grid(plain, scaled(found, made), symmetric, None, weight)
    made.input_scale, made.input_zero_point = scale, zero
    return made


def scaled(found: FirstToken, plan: FirstTokenPlan) -> Histogram:
    """The statistics of what such a layer rounds, under its plan, as of one input."""
    return together((found.first, found.others), [plan.first_factor, 1.0])
