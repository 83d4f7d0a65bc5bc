"""Times of layers by themselves on a GPU: CUDA graphs of their calls, on operands that no cache holds, or in it.

One layer stands for all of its kind. It is called on the input that the model gave it; copies of layer and input, as
many as it takes to go past the cache, make a graph, and formats take turns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.calls import Call
from ..hooks import hooked
from ..kernels.tuning import stopwatch
from .clocks import Figure, entry

COPIES = 16  # of a layer at most

Made = list[tuple[tuple, dict]]
"""The calls of a layer in one step: (args, kwargs)."""


def alone(
    model: nn.Module,
    call: Call,
    formats: Mapping[str, Mapping[str, nn.Module]],
    kinds: Mapping[str, str],
    words: Mapping[str, Mapping[str, str]],
    rounds: int,
    cold: bool = True,
) -> dict[str, Figure]:
    """ "kind | format" -> figure of all calls of one layer in a step. The call's times are tensors of the device.

    cold: each call finds its operands in memory; otherwise in the cache, as far as they fit.
    """
    first = {kind: name for name, kind in reversed(list(kinds.items()))}
    calls = _made(model, call, list(first.values()))
    found: dict[str, Figure] = {}
    for kind, name in first.items():
        own = model.get_submodule(name)
        some = {words[label][name]: layers.get(name, own) for label, layers in formats.items()}
        copies = {said: _copies(layer, calls[name], COPIES if cold else 1) for said, layer in some.items()}
        for said, figure in _raced(copies, rounds).items():
            found[entry(kind, said)] = _times(figure, len(calls[name]))
    return found


def _made(model: nn.Module, call: Call, names: list[str]) -> dict[str, Made]:
    calls: dict[str, Made] = {name: [] for name in names}

    def keep(name: str) -> Callable:
        return lambda module, args, kwargs: calls[name].append(_copied((args, kwargs)))

    with hooked(model, {name: keep(name) for name in names}):
        model(*call.args, **call.kwargs)
    return calls


def _copied(values: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)


def _copies(layer: nn.Module, calls: Made, most: int) -> list[Callable]:
    """Calls of copies of a layer on copies of its inputs, together more than a cache holds, where so many may be."""
    moved = sum(t.nbytes for t in [*layer.parameters(), *pytree.tree_leaves(calls)] if isinstance(t, Tensor))
    found: list[Callable] = []
    for _ in range(min(most, math.ceil(stopwatch.COLD / max(moved, 1)))):
        own = copy.deepcopy(layer)
        for args, kwargs in _copied(calls):
            found.append(lambda own=own, args=args, kwargs=kwargs: own(*args, **kwargs))
    return found


def _raced(candidates: dict[str, list[Callable]], rounds: int) -> dict[str, Figure]:
    """The figure of one call of each candidate, in graphs that take turns."""
    repeats = {name: math.ceil(stopwatch.CALLS / len(calls)) for name, calls in candidates.items()}
    graphs = {name: stopwatch.graph_of(calls * repeats[name])[0] for name, calls in candidates.items()}
    counts = {name: len(calls) * repeats[name] for name, calls in candidates.items()}
    seconds = in_turns(graphs, rounds)
    return {name: Figure.of([one / counts[name] for one in numbers]) for name, numbers in seconds.items()}


def in_turns(graphs: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of replays of each graph, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + stopwatch.WARM_UP):
        for name, graph in graphs.items():
            spent = stopwatch.elapsed(graph.replay) * 1e-6
            if turn >= stopwatch.WARM_UP:
                seconds[name].append(spent)
    return seconds


def _times(figure: Figure, count: int) -> Figure:
    return Figure(figure.median * count, figure.low * count, figure.high * count, figure.count)
