"""Capturing a CUDA graph; where that fails, random numbers are as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def captured(
    pool: object = None, generators: Sequence[torch.Generator] = (), device: torch.device | None = None
) -> Iterator[torch.cuda.CUDAGraph]:
    """The graph of what is launched inside, on `device` or the current one.

    pool: of another graph whose memory it shares. generators: what it draws from, beside the device's own.

    Raises what the capture raises. PyTorch leaves generators in the state of a capture then, and whoever draws from
    them next is refused ("Offset increment outside graph capture"): here they get the state of before.
    """
    graph = torch.cuda.CUDAGraph()
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    drawn = [torch.cuda.default_generators[index], *generators]
    for generator in generators:
        graph.register_generator_state(generator)
    before = [generator.clone_state() for generator in drawn]
    try:
        with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
            yield graph
    except BaseException:
        for generator, state in zip(drawn, before, strict=True):
            generator.graphsafe_set_state(state)
        raise
