"""The importance of rows of weights: scores that say which should get 8 bits at a fixed average width.

"Gradient-Based Post-Training Quantization: Challenging the Status Quo", Yvinec et al., arXiv:2308.07662, has such an
allocation; its rule is not public where we could read it. What follows is our assumption. For row n of a weight W,
with Q(W) its nearest codes at the narrow width, d_n = Q(W)_n - W_n, and a sum over calibration tuples x:

    gradient     sum |<g_n, w_n>|,   g = dL/dW,  L = <r, eps(x)>,  r Gaussian, drawn anew for each tuple
    integrated   sum |<g_n, d_n>|,   g = mean_t dL/dW at W + t d,  t = 1/8 .. 1,  L = |eps_t - eps|^2 / |eps|^2
    endpoint     the same with t = 1 alone, in an eighth of the time
    magnitude    |d_n|^2
    random       a draw

mixed_rows.py takes rows by score over their number of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..calibration.calls import Call, Calls
from ..calibration.record import ready, replay, samples_of
from ..errors import UserError
from ..layers.view import LayerView
from ..pipelines.denoiser import evaluation_mode
from ..pipelines.loading import not_while_loading
from ..progress import progress_bar
from ..ranges.registry import OBJECTIVES
from ..ranges.weights import weight_grid
from ..registry import Registry

PARTS = 8  # of the way from W to Q(W)

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
    """

    model: nn.Module
    views: list[LayerView]
    bits: int
    objective: str = "max"
    parameter: float | None = None
    calls: Calls | None = None
    seed: int = 0

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Layer -> its weight [N, ...], not a copy."""
        return {view.name: view.module.weight.detach() for view in self.views}

    @cached_property
    def errors(self) -> dict[str, Tensor]:
        """Layer -> Q(W) - W [N, ...] in W's dtype."""
        ranges = ("mse", None) if OBJECTIVES.find(self.objective).needs else (self.objective, self.parameter)
        found = {}
        for name, weight in self.weights.items():
            matrix = weight.flatten(1).float()
            grid = weight_grid(matrix, self.bits, *ranges)
            found[name] = (grid.values(grid.codes(matrix)) - matrix).view_as(weight).to(weight.dtype)
        return found

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
            name: by[name].new_zeros(len(by[name]), dtype=torch.float64) if slope is None else _inner(slope, by[name])
            for name, slope in zip(leaves, found, strict=True)
        }  # None: a layer that this call does not reach


@register_importance("gradient", needs=frozenset({"calls"}))
def gradient(task: RowTask) -> dict[str, Tensor]:
    """Sum over tuples of |<g_n, w_n>|, g the gradient of the model's output in a random direction."""
    total: dict[str, Tensor] = {}
    for number, (part, call) in enumerate(task.tuples()):
        generator = torch.Generator("cpu").manual_seed(task.seed * 1_000_003 + number)

        def along(samples: Tensor, generator: torch.Generator = generator) -> Tensor:
            return (samples * torch.randn(samples.shape, generator=generator).to(samples.device)).sum()

        found = task.slopes(part, call, task.weights, along, task.weights)
        total = {name: total.get(name, 0) + slope.abs() for name, slope in found.items()}
    return total


@register_importance("integrated", needs=frozenset({"calls"}))
def integrated(task: RowTask) -> dict[str, Tensor]:
    """Sum over tuples of what each row's rounding adds to the error, along the way from W to Q(W).

    Absolute values are taken tuple by tuple: rows whose effects on several tuples are of two signs matter, too.
    """
    return _attributed(task, [step / PARTS for step in range(1, PARTS + 1)])


@register_importance("endpoint", needs=frozenset({"calls"}))
def endpoint(task: RowTask) -> dict[str, Tensor]:
    """The same by the gradient at Q(W) alone."""
    return _attributed(task, [1.0])


def _attributed(task: RowTask, parts: list[float]) -> dict[str, Tensor]:
    """Layer -> sum over tuples of |mean over t of <g_n(W + t d), d_n>| for these t."""
    total: dict[str, Tensor] = {}
    for part, call in task.tuples():
        with evaluation_mode(task.model):
            exact = replay(task.model, part).float()

        def error(samples: Tensor, exact: Tensor = exact) -> Tensor:
            return (samples - exact).square().sum() / exact.square().mean()  # a mean would vanish in 16 bits

        added: dict[str, Tensor] = {}
        for share in parts:
            moved = {name: torch.add(w, task.errors[name], alpha=share) for name, w in task.weights.items()}
            found = task.slopes(part, call, moved, error, task.errors)
            added = {name: added.get(name, 0) + slope / len(parts) for name, slope in found.items()}
        total = {name: total.get(name, 0) + one.abs() for name, one in added.items()}
    return total


@register_importance("magnitude")
def magnitude(task: RowTask) -> dict[str, Tensor]:
    """|Q(W)_n - W_n|^2: what rounding does to the weight, whatever it does to the model."""
    return {name: _inner(error, error) for name, error in task.errors.items()}


@register_importance("random")
def random(task: RowTask) -> dict[str, Tensor]:
    """A draw for each row, the same for each of its weights."""
    generator = torch.Generator("cpu").manual_seed(task.seed)
    return {
        view.name: torch.rand(len(view.weight), generator=generator, dtype=torch.float64) * view.weight.shape[1]
        for view in task.views
    }


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """<a_n, b_n> of the rows of two tensors [N, ...], float64 [N]."""
    return (one.flatten(1).float() * other.flatten(1).float()).sum(1, dtype=torch.float64)
