"""CUDA graphs as a `Backend`: what a forward pass launches, launched again by one call of the driver."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels.tuning import stopwatch


class CudaGraphs:
    """Graphs of one network on one GPU. They share their memory: no two of them run at the same time.

    A call waits for the one before on whatever stream that was, for they use the same places.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None

    def place(self, tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
        """A copy on the GPU; a time that was on the CPU lies there then, too."""
        place = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=self.device)
        return place.copy_(tensor)

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, outputs); RuntimeError where the function waits for the GPU, or has too little memory."""
        with torch.cuda.device(self.device):
            try:
                graph, outputs = stopwatch.graph_of([function], self.pool)
            except torch.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
                raise
            self.pool = self.pool or graph.pool()

        return graph.replay, outputs

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The places are this call's, after all that was queued in the turn before."""
        with torch.cuda.device(self.device):
            if self.done is None:
                self.done = torch.cuda.Event()
            else:
                torch.cuda.current_stream().wait_event(self.done)
            yield
            self.done.record()

    def emptied(self) -> None:
        """The memory of graphs that are gone is gone with them."""
        self.pool = None
