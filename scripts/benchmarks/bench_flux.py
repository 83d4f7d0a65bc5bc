"""A FLUX-sized transformer in 4 bits against bfloat16: time of a step, and bytes of the weights.

    python scripts/benchmarks/bench_flux.py --output out/bench-flux.json  # one GPU with 60 GB

19 double and 38 single blocks with random weights (12 B parameters), one image of 4096 tokens and 512 text tokens.
Query, key and value are one layer, as diffusers' `fuse_qkv_projections` makes them, for bfloat16 too. All layers of
blocks become W4A8 (or --activations int8, int4) with a branch of rank 32, adaLN weight-only; rounding is to nearest,
which changes no time, and layers that share an input share smoothing and the branch's first half. "fused" is the
quantized model after ptq4dm.fuse. Each form is timed as it is, with its blocks compiled by torch.compile, compiled in
a CUDA graph, and as `ptq4dm.optimize` leaves it ("optimized": a graph, inputs copied in, outputs out); medians.
"speedup_<way>" is of the same way of bf16; "speedup_over_compiled" of each form's graph over bf16 compiled. "profile"
is where the GPU's time goes in a compiled step, in ms by kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from flux_slice import BLOCKS, build, tuples
from torch import nn

import ptq4dm
from ptq4dm.calibration.calls import Call
from ptq4dm.calibration.record import ready
from ptq4dm.errors import run
from ptq4dm.files.atomic import replacing
from ptq4dm.kernels.tuning import stopwatch
from ptq4dm.layers.base import replace_module
from ptq4dm.quantization.report import stored_bytes
from ptq4dm.svdquant.group import Group, split_weight
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.packing import build_layer

GROUP_SIZE = 64
FORMS = ("bf16", "quantized", "fused")
WAYS = ("eager", "compiled", "graph", "optimized")


def fused_model(args) -> nn.Module:
    model = build(tuple(args.blocks), args)
    model.fuse_qkv_projections()
    for module in model.modules():
        if hasattr(module, "to_qkv"):  # diffusers keeps what it fused
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                if getattr(module, name, None) is not None:
                    delattr(module, name)
    return model


def quantize_blocks(model: nn.Module, activations: str, rank: int) -> list[str]:
    """Every Linear of the blocks in place, without calibration; returns the kernels that serve them."""
    kernels, groups = set(), {}
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and "blocks." in name:
            groups.setdefault(leader_of(name), []).append(name)
    for leader, names in groups.items():
        embedded = "norm" in leader  # adaLN: one row
        plan = SVDQPlan(
            rank=0 if embedded else rank, group_size=GROUP_SIZE, activation="none" if embedded else activations
        )
        layers = [model.get_submodule(name) for name in names]
        weight = torch.cat([layer.weight.float() for layer in layers])
        group = Group(weight, weight, torch.ones_like(weight[0]), plan, layers[0].weight.dtype)
        split = split_weight(group, group.peak)
        start, lender = 0, None
        for name, layer in zip(names, layers, strict=True):
            rows = slice(start, start + layer.out_features)
            own = plan if lender is None else replace(plan, lender=leader)
            new = build_layer(layer, own, split, rows, layer.weight.dtype, lender)
            replace_module(model, name, new)
            kernels.add(new.kernel_name())
            start, lender = rows.stop, lender or new
    return sorted(kernels)


def leader_of(name: str) -> str:
    """The first of the layers that share an input with this one, as svdquant.trace finds it."""
    return name.replace("attn.to_qkv", "proj_mlp") if name.startswith("single_") else name


def uncompiled(model: nn.Module) -> None:
    """Take back what compiling the blocks did."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def seconds(model: nn.Module, call: Call, repeats: int) -> float:
    """Median time of a step."""

    def once() -> float:
        start = clock()
        model(*call.args, **call.kwargs)
        return clock() - start

    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(repeats))


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(model: nn.Module, call: Call, args) -> dict:
    figures = {"bytes": stored_bytes(model), "eager_ms": 1e3 * seconds(model, call, args.repeats)}
    if not args.no_compile:
        model.compile_repeated_blocks(fullgraph=True)
        figures["compiled_ms"] = 1e3 * seconds(model, call, args.repeats)
    if torch.cuda.is_available():
        figures["profile"] = profile(model, call)
        graph, _ = stopwatch.graph_of([lambda: model(*call.args, **call.kwargs)])
        figures["graph_ms"] = statistics.median(stopwatch.elapsed(graph.replay) for _ in range(args.repeats)) / 1e3
        del graph
        done = ptq4dm.optimize(model, fused=False, compiled=False)  # which they are, where the form is so
        figures["optimized_ms"] = 1e3 * seconds(model, call, args.repeats)
        done.undo()
    return figures


def profile(model: nn.Module, call: Call, most: int = 16) -> dict[str, float]:
    """Milliseconds by kernel of one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(*call.args, **call.kwargs)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return {f"{e.count} x {e.key[:80]}": round(e.self_device_time_total / 1e3, 3) for e in events[:most]}


def table(result: dict) -> str:
    """Milliseconds of a step by form and way; how many times faster a form's graph is than bf16 compiled, and in one.

    Whatever was not measured is "-".
    """
    widths, lines = (10, 10, 10, 12, 17, 14), []
    for form in FORMS:
        times = [result[form].get(f"{way}_ms") for way in WAYS]
        bf16 = [result["bf16"].get(f"{way}_ms") for way in ("compiled", "graph")]
        cells = ["-" if time is None else f"{time:.1f}" for time in times]
        graph = times[WAYS.index("graph")]
        cells += ["-" if None in (time, graph) else f"{time / graph:.2f}" for time in bf16]
        lines.append((form, *cells))
    head = ("ms of a step", *WAYS, "x bf16 compiled", "x bf16 graph")
    rows = [f"{name:12}" + "".join(map("{:>{}}".format, cells, widths)) for name, *cells in [head, *lines]]
    return "\n".join([*rows, f"bytes of the quantized model: {result['bytes_ratio']:.3f} of bf16's"])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, nargs=2, default=BLOCKS, metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels")
    parser.add_argument("--tokens", type=int, default=4096, help="of the image, a square number")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--activations", choices=("fp8", "int8", "int4"), default="fp8")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument("--output", type=Path, default=Path("out/bench-flux.json"))
    args = parser.parse_args()
    args.num_tuples = 1
    names = ("blocks", "heads", "tokens", "text_tokens", "activations", "rank")
    result = {name: getattr(args, name) for name in names}
    result["device"] = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    model = fused_model(args)
    call = ready(tuples(model, args).recorded(), model)  # on the device, as a pipeline hands it over
    result["bf16"] = measure(model, call, args)
    del model  # compiled for its layers; and two would take twice the memory
    torch._dynamo.reset()
    model = fused_model(args)
    result["kernels"] = quantize_blocks(model, args.activations, args.rank)
    result["quantized"] = measure(model, call, args)
    uncompiled(model)
    result["modules_fused"] = len(ptq4dm.fuse(model))
    result["fused"] = measure(model, call, args)
    result["bytes_ratio"] = result["quantized"]["bytes"] / result["bf16"]["bytes"]
    for way in WAYS:
        if f"{way}_ms" in result["bf16"]:
            for form, name in (("quantized", "speedup"), ("fused", "speedup_fused")):
                result[f"{name}_{way}"] = result["bf16"][f"{way}_ms"] / result[form][f"{way}_ms"]
    if "graph_ms" in result["bf16"] and "compiled_ms" in result["bf16"]:
        result["speedup_over_compiled"] = {
            form: result["bf16"]["compiled_ms"] / result[form]["graph_ms"] for form in FORMS
        }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    print(table(result))


if __name__ == "__main__":
    run(main)
