"""What the layers of one block are fed on calibration calls: captured when asked for, kept while it is packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..evidence import LayerEvidence
from ..hooks import computing
from ..layers.base import replace_module
from ..pipelines.denoiser import evaluation_mode
from ..pipelines.loading import not_while_loading
from .calls import Calls
from .capture import Captured, Resumed, capture

BATCH = 8  # calibration tuples per forward


class Evidence:
    """Evidence on some layers and modules of a model, from one run of it on calibration calls.

    layers: names of layers whose inputs may be asked for; modules: names of modules whose calls may be.
    batches: the calls; seed: of the rows that are kept.
    before: quantized layers by name, put into the model while it runs: inputs are then what a quantized prefix gives.
    resumed: see `capture`; without it the model runs from its start.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[str],
        modules: list[str],
        batches: list[Calls],
        seed: int = 0,
        before: dict[str, nn.Module] | None = None,
        resumed: Resumed = lambda _: nullcontext(),
    ):
        self.model, self.layers, self.modules = model, layers, modules
        self.batches, self.seed, self.before, self.resumed = batches, seed, before or {}, resumed
        self._layers: dict[str, LayerEvidence] = {}
        self._exact: dict[str, list[list[Tensor]]] = {}

    @cached_property
    def captured(self) -> Captured:
        """All that was asked for, from one run."""
        with substituted(self.model, self.before):
            return capture(self.model, self.layers, self.modules, self.batches, self.seed, self.resumed)

    def of(self, name: str) -> LayerEvidence:
        """What a layer is fed. Raises UserError if calibration never called it."""
        if name not in self._layers:
            got = self.captured
            if name not in got.rows:
                raise UserError(f"layer '{name}' of the plan was not called during calibration.")
            self._layers[name] = LayerEvidence(got.rows[name], got.peaks[name], got.lows[name])
        return self._layers[name]

    def calls(self, module: str) -> list[tuple[tuple, dict]]:
        """(args, kwargs) of every call of a module."""
        return self.captured.calls[module]

    def outputs(self, module: str) -> list[list[Tensor]]:
        """The tensors that a module gives on its calls, in full precision."""
        if module not in self._exact:
            self._exact[module] = self._run(module)
        return self._exact[module]

    @torch.no_grad()
    def module_error(self, module: str, forwards: dict[str, Callable[[Tensor], Tensor]]) -> float:
        """Squared error of a module's outputs with the forward passes of some of its layers replaced, by name."""
        exact = self.outputs(module)
        with computing(self.model, forwards):
            results = self._run(module)
        pairs = [pair for two in zip(exact, results, strict=True) for pair in zip(*two, strict=True)]
        return sum(squared_error(a, b) for a, b in pairs)

    @torch.no_grad()
    def _run(self, name: str) -> list[list[Tensor]]:
        module = self.model.get_submodule(name)
        with evaluation_mode(module), not_while_loading():
            return [_tensors(module(*args, **kwargs)) for args, kwargs in self.calls(name)]


def calibration_batches(calls: Calls, num_tuples: int) -> list[Calls]:
    """`num_tuples` of the calls, evenly from all, in batches that are one call each."""
    return list(chosen_calls(calls, num_tuples).batches(BATCH))


def chosen_calls(calls: Calls, num_tuples: int) -> Calls:
    """`num_tuples` of the calls, evenly from all."""
    count = min(num_tuples, len(calls))
    return calls[torch.linspace(0, len(calls) - 1, count).round().long().unique()]


@contextmanager
def substituted(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Put layers into a model by name, and take them out again."""
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield
    finally:
        for name, layer in originals.items():
            replace_module(model, name, layer)


def squared_error(a: Tensor, b: Tensor) -> float:
    """Sum of (a - b)^2, in float64: 16-bit squares would vanish."""
    return float((a.float() - b.float()).square().sum(dtype=torch.float64))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
