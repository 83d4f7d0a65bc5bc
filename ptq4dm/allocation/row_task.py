"""What scores of rows are asked for, and their registry: the rows of some layers, what rounding does to them, and
gradients of a loss along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..calibration.calls import Call, Calls
from ..calibration.record import ready, samples_of
from ..errors import UserError
from ..layers.plan import LayerPlan
from ..layers.registry import quantized_copy
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode
from ..pipelines.loading import not_while_loading
from ..progress import progress_bar
from ..ranges.registry import OBJECTIVES
from ..ranges.weights import weight_grid
from ..registry import Registry

IMPORTANCE: Registry = Registry("importance")


def register_importance(name: str, needs: frozenset[str] = frozenset()) -> Callable:
    """Return a decorator that makes a score known under a name: a function RowTask -> {layer: scores [N] float64}.

    needs: "calls", if it looks at calibration calls.
    """

    def add(score: Any) -> Any:
        score.needs = frozenset(needs)
        return IMPORTANCE.add(name, score)

    return add


@dataclass
class RowTask:
    """What a score is asked for: the rows of some layers of a model in full precision.

    bits: of the narrow rows; objective, parameter: of their ranges; one that looks at inputs is replaced by mse here.
    calls: calibration tuples, for scores that look at them; seed: of what is drawn.
    narrow: layer -> the plan that makes all its rows narrow, of any format, from whose nearest codes errors are then
        taken; left out, each row has one scale, by `bits` and `objective`.
    """

    model: nn.Module
    views: list[LayerView]
    bits: int
    objective: str = "max"
    parameter: float | None = None
    calls: Calls | None = None
    seed: int = 0
    narrow: Mapping[str, LayerPlan] | None = None

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Layer -> its weight [N, ...], not a copy."""
        return {view.name: view.module.weight.detach() for view in self.views}

    @cached_property
    def errors(self) -> dict[str, Tensor]:
        """Layer -> Q(W) - W [N, ...] in W's dtype."""
        if self.narrow is not None:
            return {view.name: self._error_of(view, self.narrow[view.name]) for view in self.views}
        ranges = ("mse", None) if OBJECTIVES.find(self.objective).needs else (self.objective, self.parameter)
        found = {}
        for name, weight in self.weights.items():
            matrix = weight.flatten(1).float()
            grid = weight_grid(matrix, self.bits, *ranges)
            found[name] = (grid.values(grid.codes(matrix)) - matrix).view_as(weight).to(weight.dtype)
        return found

    def _error_of(self, view: LayerView, plan: LayerPlan) -> Tensor:
        """Q(W) - W of a layer under a plan, at nearest codes on ranges that need no evidence."""
        plan = replace(plan, rounding="nearest")
        if OBJECTIVES.find(plan.objective).needs:
            plan.objective, plan.objective_parameter = "mse", None
        layer: Any = quantized_copy(view.module, plan, view.name)
        weight = view.module.weight.detach()
        return (layer.dequantized_weight() - weight.float()).to(weight.dtype)

    def part(self, calls: Calls, seed: int) -> RowTask:
        """The same task on other calls and draws; what is known of weights is not worked out again."""
        one = replace(self, calls=calls, seed=seed)
        one.__dict__ |= {"weights": self.weights, "errors": self.errors}
        return one

    def tuples(self) -> Iterator[tuple[Calls, Call]]:
        """(a calibration tuple, its one call), on the model's device."""
        if self.calls is None:
            raise UserError("this importance looks at calibration calls: pass a store from ptq4dm.collect(pipe).")
        for part in progress_bar(list(self.calls.batches(1)), desc="importance", unit="tuple"):
            yield part, ready(part, self.model)

    def slopes(
        self, part: Calls, call: Call, weights: dict[str, Tensor], loss: Callable, by: dict[str, Tensor]
    ) -> Any:
        """Layer -> <dL/dW_n, by_n> [N] float64, at these weights, for L = loss(samples float32).

        Tensors of the model stay as they are. Gradients take the memory of the weights once, and are gone afterwards.

        Raises UserError where the model gives no gradients.
        """
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad(), evaluation_mode(self.model), not_while_loading():
            named = {f"{name}.weight": leaf for name, leaf in leaves.items()}
            answer = functional_call(self.model, named, call.args, call.kwargs)
            value = loss(samples_of(answer, part).float())
            if not value.requires_grad:
                raise UserError(f"{type(self.model).__name__} gives no gradients; choose another importance.")
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return {
            name: by[name].new_zeros(len(by[name]), dtype=torch.float64) if slope is None else inner(slope, by[name])
            for name, slope in zip(leaves, found, strict=True)
        }  # None: a layer that this call does not reach


def inner(one: Tensor, other: Tensor) -> Tensor:
    """<a_n, b_n> of the rows of two tensors [N, ...], float64 [N]."""
    return (one.flatten(1).float() * other.flatten(1).float()).sum(1, dtype=torch.float64)
