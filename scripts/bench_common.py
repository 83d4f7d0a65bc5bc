"""What the benchmarks of the kernels share: operands, timing by CUDA graphs, and the libraries to compare with."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
if "ptq4dm" not in sys.modules:  # the kernels need torch and triton alone, so they run without diffusers too
    package = types.ModuleType("ptq4dm")
    package.__path__ = [str(ROOT / "ptq4dm"), str(ROOT)]
    sys.modules["ptq4dm"] = package

from ptq4dm.kernels import int4  # noqa: E402

DEVICE = "cuda"
COLD = 256 << 20  # bytes that one round over the sets of a shape moves at least: four times the L2 of an H200


def operands(m: int, n: int, k: int, rank: int, seed: int) -> types.SimpleNamespace:
    """Inputs with a few wide columns, a weight and its 4-bit form, smoothing, branch and bias, bf16 on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, device=DEVICE)

    width = normal(k).exp()
    weight = normal(n, k) / k**0.5
    codes, wscales = int4.quantize_groups(weight, 64, torch.bfloat16)
    return types.SimpleNamespace(
        x=(normal(m, k) * width).bfloat16(),
        weight=weight.bfloat16(),
        qweight=int4.pack_int4(codes, 64),
        wscales=wscales,
        smooth=width.sqrt().bfloat16(),
        down=(normal(rank, k) / k**0.5).bfloat16() if rank else None,
        up=(normal(n, rank) / rank**0.5).bfloat16() if rank else None,
        bias=normal(n).bfloat16(),
    )


def graph_of(calls: list) -> torch.cuda.CUDAGraph:
    """One graph of all calls, after a warm-up of the first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def sets_for(m: int, n: int, k: int, rank: int) -> list[types.SimpleNamespace]:
    """As many sets of operands as no cache holds: each call finds its own in memory."""
    return [operands(m, n, k, rank, seed) for seed in range(min(16, math.ceil(COLD / (2 * m * k + n * k // 2))))]


def race(candidates: dict[str, list], rounds: int = 11) -> dict[str, float]:
    """Median microseconds of one call of each; a candidate is a list of calls, one for each set of operands."""
    graphs = {}
    for name, calls in candidates.items():
        graphs[name] = graph_of(calls * math.ceil(12 / len(calls))), len(calls) * math.ceil(12 / len(calls))
    times = {name: [] for name in candidates}
    for turn in range(rounds + 2):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn > 1:
                times[name].append(start.elapsed_time(end) / count * 1e3)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def over(sets: list, function) -> list:
    return [lambda one=one: function(one) for one in sets]


def error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def float8_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def libraries(sets: list) -> dict[str, list]:
    """What there is without us: cuBLAS in bf16 and fp8; the quantization of the latter compiled by torch."""
    quantize = torch.compile(float8_rowwise, dynamic=False)
    for one in sets:
        one.w8, scale = float8_rowwise(one.weight)
        one.w8_scale = scale.T.contiguous()
        one.x8, one.x8_scale = float8_rowwise(one.x)

    def scaled(one, x8, scale):
        return torch._scaled_mm(
            x8, one.w8.T, scale, one.w8_scale, bias=one.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def with_branch(one):
        return torch.addmm(scaled(one, *quantize(one.x)), F.linear(one.x, one.down), one.up.T)

    found = {
        "bf16": over(sets, lambda one: F.linear(one.x, one.weight, one.bias)),
        "fp8": over(sets, lambda one: scaled(one, one.x8, one.x8_scale)),
        "fp8+quant": over(sets, lambda one: scaled(one, *quantize(one.x))),
    }
    if sets[0].down is not None:
        found["fp8+quant+branch"] = over(sets, with_branch)
    return found
