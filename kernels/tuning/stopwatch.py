"""One stopwatch for every benchmark and search: medians of CUDA graph replays, of launches as they are, or on a CPU.

A candidate is a list of calls, one for each of several sets of operands, together more than a cache holds: each call
then finds its own in memory. Candidates of one race take turns, so that none has a warmer or a colder GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from ..runtime.capture import captured

CALLS = 12  # that a graph holds at least: a short launch is lost in what a replay costs
WARM_UP = 2
COLD = 160e6  # bytes that the calls of a candidate go through: more than twice the L2 of any GPU there is


def graph_of(calls: list[Callable], pool: object = None) -> tuple[torch.cuda.CUDAGraph, object]:
    """(one CUDA graph of all calls, what the last of them returned).

    All are called before: what a call makes once and keeps must not become part of the graph. pool: of another graph
    whose memory it shares; the two must not run at the same time, and what they return is gone with the next replay.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*dict.fromkeys(calls)] * WARM_UP:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    result = None
    with captured(pool) as graph:
        for call in calls:
            result = call()
    return graph, result


def elapsed(call: Callable) -> float:
    """Microseconds that the GPU takes for one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def in_a_graph(call: Callable, repeats: int) -> float:
    """Median microseconds of the GPU for one call in a CUDA graph, of so many replays."""
    graph, _ = graph_of([call])
    return statistics.median(elapsed(graph.replay) for _ in range(repeats))


def race(candidates: dict[str, list[Callable]], rounds: int = 11) -> dict[str, float]:
    """Median microseconds of one call of each candidate, in CUDA graphs."""
    graphs = {}
    for name, calls in candidates.items():
        turns = math.ceil(CALLS / len(calls))
        graphs[name] = graph_of(calls * turns)[0], len(calls) * turns
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + WARM_UP):
        for name, (graph, count) in graphs.items():
            spent = elapsed(graph.replay) / count
            if turn >= WARM_UP:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def microseconds(calls: list[Callable], rounds: int = 11) -> float:
    """Median microseconds of one call of one candidate, in CUDA graphs."""
    return race({"": calls}, rounds)[""]


def launched(call: Callable, rounds: int = 20) -> float:
    """Median microseconds of a call that is launched each time, without a graph."""
    for _ in range(WARM_UP + 1):
        call()
    return statistics.median(elapsed(call) for _ in range(rounds))


def on_cpu(calls: list[Callable], rounds: int = 11) -> float:
    """Median microseconds of wall time of one call, on a CPU."""
    times = []
    for turn in range(rounds + WARM_UP):
        for call in calls:
            start = time.perf_counter()
            call()
            if turn >= WARM_UP:
                times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)
