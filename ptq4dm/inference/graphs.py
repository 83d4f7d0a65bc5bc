"""Calls of a network replayed from graphs: recorded once for each form of its arguments.

A form is the shapes, types and strides of the tensors and the values of all other arguments, such as an adapter's
scale that is given with the call. The first call of a form runs as it is; the second one is captured, on copies of
its tensors at fixed places; later ones copy theirs there and replay. Outputs are copied out: the next replay would
write over them. Of several forms (resolutions, guided and not) so many graphs are kept, and the one that was not used
for longest goes.

A call is run as it is, and why is counted in `plain`, where a graph would do something else: with gradients, in
training, while hooks wait for calls of layers (offloading, recorders, caches), or with arguments of unknown kinds.
Where the model is not what it was (`Watch`), all its graphs are dropped and captured anew. What changes before its
graphs were of use has to be called twice as often before they are captured, each time that happens.

`Backend` is what captures: CUDA's graphs (cuda_graphs.py), or what a test puts in their place.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..caching.deep_part import reuse_of
from ..caching.state import PLAIN
from ..pipelines.denoiser import time_names
from .blocks import plain_forward
from .watch import Unwatched, Watch, hooked, watched

KEPT = 8
USES = 4  # replays of each graph before a change of the model, from which on they were worth it
LONGEST = 10  # times that the number of calls before a capture doubles
MOST_SEEN = 256  # forms whose calls are counted


class Backend(Protocol):
    """What captures a function of tensors at fixed places, and replays it."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, what the function returned); after replay() its tensors hold what it would return now.

        Raises RuntimeError where the function cannot be captured.
        """

    def place(self, tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
        """A copy of a tensor, with these strides, for a graph to read."""

    def turn(self) -> AbstractContextManager[None]:
        """In which places are written, and the graph is replayed and read."""

    def emptied(self) -> None:
        """No graph of it is left."""


@dataclass
class Graph:
    """One form's graph: where it reads its tensors, and where it leaves its outputs."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    outputs: Any
    replays: int = 0


class Graphed:
    """A network's forward through graphs. It takes the place of `forward` in the network's attributes."""

    computes_whole = False
    """Whether another library computes it, so that none of its modules is called."""

    def __init__(self, model: nn.Module, backend: Backend, kept: int = KEPT, compute: Callable | None = None) -> None:
        """compute: what the network computes by; None: its class's forward."""
        self.model, self.backend, self.kept = model, backend, kept
        self.compute = compute or plain_forward(model)
        self.graphs: OrderedDict[Any, Graph] = OrderedDict()
        self.seen: OrderedDict[Any, int] = OrderedDict()
        self.refused: dict[Any, str] = {}
        self.plain: Counter[str] = Counter()
        self.captures = self.replays = self.dropped = self.in_vain = 0
        self.watch: Watch | None = None
        self.lock = threading.RLock()
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.times = time_names(self.names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            if why := self._why_plain():
                return self._as_it_is(why, args, kwargs)
            leaves, structure = pytree.tree_flatten((args, kwargs))
            leaves = self._times_as_tensors(leaves, structure)
            form = _form(leaves, structure, reuse_of(self.model))
            graph = None if isinstance(form, str) else self.graphs.get(form)
            watch, made = self.watch, None
            in_place = watch is not None and watch.in_place()
            if graph is not None and in_place:
                made = self._replayed(graph, leaves)  # what is set in the model is looked at while the GPU computes
            untouched = watch is not None and in_place and watch.nothing_set()
            if not untouched and (why := hooked(self.model)):
                return self._as_it_is(why, args, kwargs)
            if isinstance(form, str):
                return self._as_it_is(form, args, kwargs)
            if watch is not None and not (untouched or watch.unchanged()):
                self._model_changed()
                graph = made = None
            if graph is None:
                if form in self.refused:
                    return self._as_it_is(self.refused[form], args, kwargs)
                if self._seen(form) <= 1 << min(self.in_vain, LONGEST):
                    why = "the model keeps changing" if self.in_vain else "the first call of a form"
                    return self._as_it_is(why, args, kwargs)
                graph = self._captured(form, leaves, structure)
                if graph is None:
                    return self._as_it_is(self.refused[form], args, kwargs)
            self.graphs.move_to_end(form)
            graph.replays += 1
            self.replays += 1
            return self._replayed(graph, leaves) if made is None else made

    def clear(self) -> None:
        """Drop all graphs, and their memory."""
        with self.lock:
            self.dropped += len(self.graphs)
            self.graphs.clear()
            self.seen.clear()
            self.refused.clear()
            self.watch = None
            self.backend.emptied()

    def __reduce__(self) -> tuple:
        """A copy of the network has a plain forward: graphs read the tensors of this one."""
        return plain_forward, (self.model,)

    def _why_plain(self) -> str:
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if self.model.training:
            return "the model is in training"
        if watched():
            return "operations of torch are looked at, or changed"
        return ""

    def _as_it_is(self, why: str, args: tuple, kwargs: dict) -> Any:
        self.plain[why] += 1
        return self.compute(*args, **kwargs)

    def _times_as_tensors(self, leaves: list, structure: Any) -> list:
        """A time that is a number becomes a tensor: it differs in every step, and each would be a form of its own."""
        positions, named = structure.unflatten(range(len(leaves)))
        where = dict(zip(self.names, positions, strict=False)) | named
        leaves = list(leaves)
        for place in (where[name] for name in self.times if isinstance(where.get(name), int)):
            if type(leaves[place]) in (int, float):
                dtype = torch.int64 if type(leaves[place]) is int else torch.float64
                leaves[place] = torch.tensor(leaves[place], dtype=dtype)
        return leaves

    def _seen(self, form: Any) -> int:
        """How often this form was called, this time included."""
        self.seen[form] = count = self.seen.pop(form, 0) + 1
        if len(self.seen) > MOST_SEEN:
            self.seen.popitem(last=False)
        return count

    def _model_changed(self) -> None:
        used = sum(graph.replays for graph in self.graphs.values())
        self.in_vain = 0 if used >= USES * len(self.graphs) else self.in_vain + 1
        self.clear()

    def _captured(self, form: Any, leaves: list, structure: Any) -> Graph | None:
        while len(self.graphs) >= self.kept:
            self.graphs.popitem(last=False)
            self.dropped += 1
        if not self.graphs:
            self.backend.emptied()
        inputs = [self.backend.place(leaf, strides(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
        rest = iter(inputs)
        args, kwargs = structure.unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        try:
            if self.watch is None:  # what a first call keeps in the model is there now
                self.watch = Watch(self.model, left=["forward"])
            replay, outputs = self.backend.capture(lambda: self.compute(*args, **kwargs))
        except Unwatched as error:
            self.refused[form] = str(error)
            return None
        except RuntimeError as error:
            self.refused[form] = f"it cannot be captured ({(str(error).splitlines() or ['?'])[0][:120]})"
            return None
        self.captures += 1
        graph = self.graphs[form] = Graph(replay, inputs, outputs)
        return graph

    def _replayed(self, graph: Graph, leaves: list) -> Any:
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with self.backend.turn():
            for place, tensor in zip(graph.inputs, given, strict=True):
                place.copy_(tensor, non_blocking=True)
            graph.replay()
            return pytree.tree_map_only(Tensor, torch.clone, graph.outputs)


def strides(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's strides in a graph: its own, but for one whose elements share memory, as those of a time may."""
    own = tensor.stride()
    if any(stride == 0 and size > 1 for stride, size in zip(own, tensor.shape, strict=True)):
        return tensor.new_empty(tensor.shape, device="meta").stride()
    return own


def _form(leaves: list, structure: Any, reuse: Any) -> Any:
    """What calls that may share a graph agree in; a text: why there can be none. reuse: of a part, see `reuse_of`."""
    facts: list[Any] = [structure, reuse]
    for leaf in leaves:
        if type(leaf) in (Tensor, nn.Parameter):
            if leaf.layout != torch.strided:
                return "a tensor is sparse"
            facts += leaf.shape, strides(leaf), leaf.dtype, leaf.device
        elif isinstance(leaf, PLAIN):
            facts += type(leaf), leaf
        else:
            return f"an argument is of the class {type(leaf).__name__}"
    for kind in ("cuda", "cpu"):
        facts += torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return tuple(map(_hashable, facts)), torch.is_inference_mode_enabled()


def _hashable(fact: Any) -> Any:
    return fact if isinstance(fact, (tuple, *PLAIN)) else repr(fact)
