"""Times of a model's layers on a GPU: CUDA graphs of their calls, on operands that no cache holds.

One layer stands for all of its kind. It is called on the input that the model gave it; copies of layer and input, as
many as it takes to go past the cache, make a graph, and formats take turns. The step is a graph of the whole model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.calls import Call
from ..calibration.evidence import substituted
from ..calibration.record import times_of
from ..hooks import hooked
from ..kernels.tuning import stopwatch
from ..pipelines.denoiser import evaluation_mode
from ..progress import progress_bar
from .clocks import Figure, entry

COPIES = 16  # of a layer at most

Made = list[tuple[tuple, dict]]
"""The calls of a layer in one step: (args, kwargs)."""


def time_in_graphs(
    model: nn.Module,
    call: Call,
    formats: Mapping[str, Mapping[str, nn.Module]],
    kinds: Mapping[str, str],
    words: Mapping[str, Mapping[str, str]],
    rounds: int,
) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """("kind | format" -> figure, label -> figure of the step); arguments as in `costs`."""
    first = {kind: name for name, kind in reversed(list(kinds.items()))}
    found: dict[str, Figure] = {}
    device = next(model.parameters()).device
    call = with_times_on(device, model, call)
    with torch.no_grad(), torch.cuda.device(device), evaluation_mode(model):
        calls = _made(model, call, list(first.values()))
        for kind, name in progress_bar(list(first.items()), desc="timing", unit="kind"):
            own = model.get_submodule(name)
            some = {words[label][name]: layers.get(name, own) for label, layers in formats.items()}
            figures = _raced({said: _cold(layer, calls[name]) for said, layer in some.items()}, rounds)
            count = len(calls[name])
            found |= {entry(kind, said): _times(figure, count) for said, figure in figures.items()}
        steps: dict[str, Figure] = {}
        for label, layers in formats.items():
            with substituted(model, dict(layers)):
                steps |= _raced({label: [lambda: model(*call.args, **call.kwargs)]}, rounds)
    return found, steps


def with_times_on(device: torch.device, model: nn.Module, call: Call) -> Call:
    """A call whose times are tensors of a device, as a scheduler's are: a graph copies no number there."""
    leaves, structure = call.flat()
    for i in times_of(model, call):
        leaves[i] = torch.as_tensor(leaves[i], device=device)
    return Call.nested(leaves, structure)


def _made(model: nn.Module, call: Call, names: list[str]) -> dict[str, Made]:
    calls: dict[str, Made] = {name: [] for name in names}

    def keep(name: str) -> Callable:
        return lambda module, args, kwargs: calls[name].append(_copied((args, kwargs)))

    with hooked(model, {name: keep(name) for name in names}):
        model(*call.args, **call.kwargs)
    return calls


def _copied(values: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)


def _cold(layer: nn.Module, calls: Made) -> list[Callable]:
    """Calls of copies of a layer on copies of its inputs, together more than a cache holds."""
    moved = sum(t.nbytes for t in [*layer.parameters(), *pytree.tree_leaves(calls)] if isinstance(t, Tensor))
    found: list[Callable] = []
    for _ in range(min(COPIES, math.ceil(stopwatch.COLD / max(moved, 1)))):
        own = copy.deepcopy(layer)
        for args, kwargs in _copied(calls):
            found.append(lambda own=own, args=args, kwargs=kwargs: own(*args, **kwargs))
    return found


def _raced(candidates: dict[str, list[Callable]], rounds: int) -> dict[str, Figure]:
    """The figure of one call of each candidate, in graphs that take turns."""
    graphs = {}
    for name, calls in candidates.items():
        turns = math.ceil(stopwatch.CALLS / len(calls)) if len(calls) > 1 else 1
        graphs[name] = stopwatch.graph_of(calls * turns)[0], len(calls) * turns
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + stopwatch.WARM_UP):
        for name, (graph, count) in graphs.items():
            spent = stopwatch.elapsed(graph.replay) / count * 1e-6
            if turn >= stopwatch.WARM_UP:
                seconds[name].append(spent)
    return {name: Figure.of(numbers) for name, numbers in seconds.items()}


def _times(figure: Figure, count: int) -> Figure:
    return Figure(figure.median * count, figure.low * count, figure.high * count, figure.count)
