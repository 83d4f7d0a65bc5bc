"""Times of forward and backward passes: layers and norms on integers against those of floats, in one run."""

from __future__ import annotations

import copy
import fnmatch
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from fast_steps import Recipe, Trainer
from reference_output import autocast
from reference_recipes import build_network, diffusion_loss
from torch import Tensor, nn

from ptq4dm.layers.shift.convert import to_integers
from ptq4dm.layers.shift.layers import ShiftConv2d, ShiftLinear
from ptq4dm.layers.shift.norms import ShiftGroupNorm, ShiftLayerNorm
from ptq4dm.layers.shift.widths import Widths

ROUNDS = 11


def cases(small: bool) -> Iterator[tuple[str, nn.Module, nn.Module, Tensor]]:
    """(name, float module, the same on integers, input): layers of both networks, wide layers, their norms.

    small: batches for a CPU.
    """
    batch = 16 if small else 128
    for channels, size, kernel in ((128, 32, 3), (128, 16, 3), (256, 32, 3), (256, 32, 1)):
        conv = nn.Conv2d(channels, 128, kernel, padding=kernel // 2).to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
        yield f"conv {kernel}x{kernel} {channels}-128 at {size}, batch {batch}", conv, ShiftConv2d(conv, Widths()), x
    for n, k, tokens in ((1024, 256, 256), (256, 1024, 256)) if small else (
        (1024, 256, 256), (256, 1024, 256), (3072, 3072, 36), (12288, 3072, 36), (3072, 12288, 36)
    ):  # fmt: skip
        linear = nn.Linear(k, n)
        yield (
            f"linear {k}-{n}, {batch} x {tokens}",
            linear,
            ShiftLinear(linear, Widths()),
            torch.randn(batch, tokens, k),
        )
    for channels, size in ((128, 32), (256, 32), (128, 8)):
        norm = nn.GroupNorm(32, channels)
        x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
        yield f"GroupNorm 32 of {channels} at {size}, batch {batch}", norm, ShiftGroupNorm(norm), x
    for width in (256, 1024):
        norm = nn.LayerNorm(width)
        yield f"LayerNorm {width}, {batch} x 256", norm, ShiftLayerNorm(norm), torch.randn(batch, 256, width)


def rows(
    device: torch.device, compiled: bool, graph: bool = False, patterns: Sequence[str] = ("*",)
) -> Iterator[dict]:
    """Milliseconds of forward, and of forward and backward, of each case; ratio: float over integers.

    On a GPU floats are bf16 under autocast and inputs bf16; on a CPU float32. compiled: both by torch.compile. graph:
    each timed in a CUDA graph, where the host has no part; then a whole training step of both networks, too.
    patterns: of the names of cases.
    """
    gpu = device.type == "cuda"

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    for name, plain, integer, x in cases(small=not gpu):
        if not wanted(name):
            continue
        plain, integer = copy.deepcopy(plain).to(device), copy.deepcopy(integer).to(device)
        x = x.to(device, torch.bfloat16 if gpu else torch.float32).requires_grad_()
        calls = {"float": plain, "integer": integer}
        if compiled:
            torch._dynamo.reset()
            calls = {kind: torch.compile(module, dynamic=False) for kind, module in calls.items()}
        with autocast(device):
            gradient = torch.randn_like(plain(x))
        row = {"case": name, "compiled": compiled, "graph": graph}
        for what, call in (("forward", _forward), ("both", _both)):
            work = {kind: call(module, x, gradient, device) for kind, module in calls.items()}
            times = race({kind: _graphed(one) for kind, one in work.items()} if graph else work, device)
            row |= {f"{what}_{kind}_ms": round(value, 4) for kind, value in times.items()}
            row[f"{what}_ratio"] = round(times["float"] / times["integer"], 3)
        yield row
    if graph:
        yield from (
            _step(name, device) for name in ("unet", "dit", "unet with L1 norms") if wanted(f"step of {name}")
        )


def _step(name: str, device: torch.device) -> dict:
    """Milliseconds of a training step at batch 64, optimizer and moving average in it, from scratch."""
    images = torch.randn(512, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (512,), device=device)
    work, network = {}, name.split()[0]
    for kind in ("float", "integer"):
        net = build_network(network).to(device)
        net = net.to(memory_format=torch.channels_last) if network == "unet" else net
        if kind == "integer":
            to_integers(net, Widths(), norms="L1" in name)
        loss = diffusion_loss(network, device)
        trainer = Trainer(net.train(), Recipe(1000, 64, 1e-5, 0.0), images, labels, loss, compiled=False, graph=True)
        work[kind] = trainer.graph.replay
    times = race(work, device)
    row = {"case": f"training step of {name}, batch 64", "compiled": False, "graph": True}
    row |= {f"both_{kind}_ms": round(value, 4) for kind, value in times.items()}
    return row | {"both_ratio": round(times["float"] / times["integer"], 3)}


def _graphed(call: Callable) -> Callable:
    """The same as a CUDA graph; gradients add up in memory that stays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _forward(module: Callable, x: Tensor, gradient: Tensor, device: torch.device) -> Callable:
    def call() -> None:
        with torch.no_grad(), autocast(device):
            module(x)

    return call


def _both(module: Callable, x: Tensor, gradient: Tensor, device: torch.device) -> Callable:
    def call() -> None:
        with autocast(device):
            y = module(x)
        y.backward(gradient.to(y.dtype))

    return call


def race(work: dict[str, Callable], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, taking turns; of one thread of a CPU by its own clock, for others use it, too."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    times: dict[str, list[float]] = {kind: [] for kind in work}
    for turn in range(ROUNDS + 3):
        for kind, call in work.items():
            _wait(device)
            began = clock()
            repeats = 10 if device.type == "cuda" else 1
            for _ in range(repeats):
                call()
            _wait(device)
            if turn >= 3:
                times[kind].append((clock() - began) * 1e3 / repeats)
    return {kind: statistics.median(values) for kind, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
