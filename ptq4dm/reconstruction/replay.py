"""A step of training as a CUDA graph: of a small block, launching its kernels takes longer than they do.

What a step reads stays where it is in memory: the tensors of its item, and what the optimizer moves. So the first
step on an item is launched as it is, the second is captured, and all others replay that: the same kernels on the same
tensors, and the same codes to the bit. What no graph can hold (a block that waits for a number from the GPU) is
launched step by step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ..kernels.runtime.capture import captured

REPEATS = 8  # replays of a graph that pay for its capture
logger = logging.getLogger(__name__)


class Replay:
    """A function of a number of things, each called `repeats` times; replayed where that is on a GPU and pays.

    function: (thing) -> tensors, from tensors that stay where they are; what it returns is valid until the next call.
    generators: of the GPU, what it draws from.
    """

    def __init__(
        self, function: Callable[[Any], Any], device: torch.device, repeats: float, generators: Sequence[Any] = ()
    ) -> None:
        self.function, self.generators = function, generators
        self.on = device.type == "cuda" and repeats >= REPEATS
        self.pool = torch.cuda.graph_pool_handle() if self.on else None
        self.known: set[Hashable] = set()
        self.graphs: dict[Hashable, tuple[Any, Any]] = {}

    def __call__(self, key: Hashable, thing: Any) -> Any:
        if key in self.graphs:
            graph, result = self.graphs[key]
            graph.replay()
            return result
        if not self.on or key not in self.known:
            self.known.add(key)
            return self.function(thing)
        try:
            graph, result = self._captured(thing)
        except RuntimeError as problem:
            logger.info("training goes on without CUDA graphs: %s", problem)
            self.on = False
            return self.function(thing)
        self.graphs[key] = graph, result
        graph.replay()
        return result

    def _captured(self, thing: Any) -> tuple[Any, Any]:
        with captured(self.pool, self.generators) as graph:
            result = self.function(thing)
        return graph, result
