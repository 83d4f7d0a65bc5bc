"""The difference that a layer's input grid makes to the model's prediction: PD-Quant, Liu et al. (arXiv 2212.07048).

    sum over tuples |eps_q - eps|^2 / sum over tuples |eps|^2

eps is what the model gives in full precision, eps_q what it gives with the layer quantized, and with all that was
settled before it. The whole model runs, in its own forward: skips count. What comes later is in full precision. The
paper compares class probabilities; a denoiser has none, so it is its outputs that are compared (our assumption).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calls import Calls
from ..calibration.evidence import BATCH, chosen_calls, squared_error, substituted
from ..calibration.record import answers, samples_of
from ..evidence import LayerEvidence
from ..hooks import hooked
from ..layers.registry import quantized_copy
from ..layers.view import LayerView
from ..layers.w8a8 import put_input_grid
from ..pipelines.denoiser import evaluation_mode
from ..walk.walk import Walk, Walks

CLEARLY = 1.05  # times the error of the best on the same tuples: such a grid is not looked at on more of them


def batches_across(calls: Calls, num_tuples: int) -> list[Calls]:
    """`num_tuples` of the calls, evenly from all, in batches that are one call each and have tuples of all times.

    So the first of them say what all will: stores are sorted by time.
    """
    chosen = chosen_calls(calls, num_tuples)
    count = -(-len(chosen) // BATCH)
    return [batch for first in range(count) for batch in chosen[first::count].batches(BATCH)]


class PredictionDifference:
    """A model, what it predicts on calibration calls, and the layers that are quantized so far.

    Layers are asked for (`of`) and settled in the order of their calls (`in_call_order`): weights by their plans,
    rounded to nearest. The model is left as it is between calls of these functions.

    batches: calls, see `batches_across`. targets: the exact predictions, one tensor a batch -> what predictions
    are compared with, where that is something else.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Calls],
        targets: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        self.model, self.batches = model, batches
        self.order: list[str] = []  # of the first calls of layers
        self.settled: dict[str, nn.Module] = {}
        self._looks: dict[str, Callable[[float, int], float]] = {}  # of the layer that was asked for last
        self._walk: Walk | None = None
        self._stands_at = self._settled_at = 0  # places in `order`: of the walk, and of the first layer settled since
        exact = self._exact()
        self.targets = exact if targets is None else targets(exact)
        self.signal = sum(squared_error(one, torch.zeros_like(one)) for one in exact) or 1.0

    def in_call_order(self, views: list[LayerView]) -> list[LayerView]:
        """The same layers in the order of their first calls; those that are never called come last."""
        places = {name: place for place, name in enumerate(self.order)}
        return sorted(views, key=lambda view: places.get(view.name, len(places)))

    def of(self, name: str, plan: Any) -> LayerEvidence:
        """Evidence whose `prediction` judges static grids of a layer's input; the rest of its plan stands."""
        layer = self._packed(name, replace(plan, input_scale=1.0, input_zero_point=0))
        self._go_on(name)
        best: list[float] = []  # what the best look so far added, batch by batch

        @cache
        def error(scale: float, zero: int) -> float:
            grid = replace(plan, input_scale=scale, input_zero_point=zero)
            put_input_grid(layer, grid, layer.qweight.device)
            parts = self._parts({**self.settled, name: layer}, best)
            if len(parts) < len(best):  # clearly worse on these, so it is not looked at on the others
                return sum(best) * (sum(parts) / sum(best[: len(parts)])) / self.signal
            if not best or sum(parts) < sum(best):
                best[:] = parts
            return sum(parts) / self.signal

        self._looks = {name: error}
        return LayerEvidence(None, prediction=error)

    def settle(self, name: str, plan: Any) -> float | None:
        """Put a layer into the part that is quantized. Its error, if `of` was asked for it; None for others."""
        if name not in self.order:
            return None
        found = self._looks[name](plan.input_scale, plan.input_zero_point) if name in self._looks else None
        self.settled[name] = self._packed(name, plan)
        self._settled_at = min(self._settled_at, self.order.index(name))
        self._looks = {}
        return found

    def _packed(self, name: str, plan: Any) -> nn.Module:
        return quantized_copy(self.model.get_submodule(name), replace(plan, rounding="nearest"), name)

    @torch.no_grad()
    def _exact(self) -> list[Tensor]:
        called: dict[str, None] = {}
        names = [name for name, _ in self.model.named_modules() if name]
        with evaluation_mode(self.model), hooked(self.model, {n: _noting(called, n) for n in names}):
            found = [samples_of(answers(self.model, batch)[0], batch) for batch in self.batches]
        self.order = list(called)
        return found

    def _go_on(self, name: str) -> None:
        """Batches go on to a layer; from the start, where one before the place that they reached was settled, or is
        asked for."""
        place = self.order.index(name) if name in self.order else len(self.order)
        if self._walk is None or min(self._settled_at, place) < self._stands_at:
            self._walk = Walks(self.model).over(self.batches)
        self._walk.on(set(self.order[place:]) or {name}, self.settled)
        self._stands_at, self._settled_at = place, len(self.order)

    def _parts(self, layers: dict[str, nn.Module], best: list[float]) -> list[float]:
        """|eps_q - eps|^2 of each batch, with some layers in place of those of their names; of the first ones alone,
        where it is CLEARLY times as much as that of the best look on the same batches."""
        parts: list[float] = []
        with evaluation_mode(self.model), substituted(self.model, layers):
            for place, (batch, target) in enumerate(zip(self.batches, self.targets, strict=True)):
                with self._walk.resumed(place) if self._walk else nullcontext():
                    parts.append(squared_error(samples_of(answers(self.model, batch)[0], batch), target))
                if best and sum(parts) > CLEARLY * sum(best[: len(parts)]):
                    break
        return parts


def _noting(called: dict[str, None], name: str) -> Callable:
    return lambda *_: called.setdefault(name)
