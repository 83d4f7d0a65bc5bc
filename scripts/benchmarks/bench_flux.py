"""A FLUX-sized transformer in 4 bits against bfloat16 and torchao's fp8: time of a step, and bytes of the weights.

    python scripts/benchmarks/bench_flux.py [--output out/bench-flux.jsonl] [--forms bf16 torchao fused]
        # one GPU with 60 GB; torchao is a row where it is installed

19 double and 38 single blocks with random weights (12 B parameters), one image of 4096 tokens and 512 text tokens.
Query, key and value are one layer, as diffusers' `fuse_qkv_projections` makes them, for all. The forms:

    bf16       as it is
    torchao    all Linear layers of blocks in fp8, a scale a row, inputs quantized in the call
    quantized  all of them W4A8 (or --activations int8, int4) with a branch of rank 32, adaLN weight-only; rounding
               is to nearest, which changes no time; layers that share an input share smoothing and half the branch
    fused      the same after ptq4dm.fuse
    cached     the same with weights kept in 8 bits (--weight-cache), as ptq4dm.optimize(weight_cache=) does it
    attention  the same with attention in 8 bits where that is faster, as ptq4dm.optimize(attention="auto") does it
    w8a8       all of them with 8-bit weights and inputs quantized in the call (--codes int8 or fp8), fused
    w8a8-attention  the same with attention in 8 bits where that is faster
    progressive     all of them with QoQ's 4-bit weights under whole-number steps, inputs quantized in the call, fused
    progressive-attention  the same with attention in 8 bits where that is faster

Each is timed as it is, with its blocks compiled by torch.compile, compiled in a CUDA graph, and as `ptq4dm.optimize`
leaves it ("optimized": a graph, inputs copied in, outputs out); medians of steps, a line of JSON each as it comes. A
"profile" is where the GPU's time goes in a compiled step, in ms by kernel. A file is gone on with where it ended.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from bench_common import Lines
from conditions import free_memory, made_on
from flux_slice import BLOCKS, build, tuples
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import ptq4dm
from ptq4dm.attention.faster import FasterAttention
from ptq4dm.calibration.calls import Call
from ptq4dm.calibration.record import ready
from ptq4dm.errors import UserError, run
from ptq4dm.inference.weight_cache import bytes_of as bytes_of_text
from ptq4dm.inference.weight_cache import keep_weights
from ptq4dm.kernels.tuning import stopwatch
from ptq4dm.layers.base import replace_module
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.svdquant.group import Group, split_weight
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.packing import build_layer

GROUP_SIZE = 64
SVDQUANT = ("quantized", "fused", "cached", "attention")
BY_ROWS = ("w8a8", "w8a8-attention"), ("progressive", "progressive-attention")  # fused
FORMS = ("bf16", "torchao", *SVDQUANT, *BY_ROWS[0], *BY_ROWS[1])
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


def by_rows(model: nn.Module, form: str, codes: str) -> list[str]:
    """Every Linear of the blocks in place, without calibration; returns the kernels that serve them."""
    eight = LayerPlan(format=codes, objective="max")
    plan, kernels = eight if form.startswith("w8a8") else ProgressivePlan(objective="max"), set()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and "blocks." in name:
            new = quantized_copy(layer, plan, name)
            replace_module(model, name, new)
            kernels.add(new.kernel_name())
    return sorted(kernels)


def leader_of(name: str) -> str:
    """The first of the layers that share an input with this one, as svdquant.trace finds it."""
    return name.replace("attn.to_qkv", "proj_mlp") if name.startswith("single_") else name


def uncompiled(model: nn.Module) -> None:
    """Take back what compiling the blocks did."""
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def step(model: nn.Module, call: Call, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, and of them until the call returned: what the host takes to queue it."""

    def once() -> tuple[float, float]:
        start = clock()
        model(*call.args, **call.kwargs)
        queued = time.perf_counter()
        return clock() - start, queued - start

    for _ in range(3):
        once()
    whole, host = zip(*(once() for _ in range(repeats)), strict=True)
    return {"ms": 1e3 * statistics.median(whole), "host_ms": 1e3 * statistics.median(host)}


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(forms: list[str], lines: Lines, args) -> None:
    """Add the lines of one model's forms."""
    model = fused_model(args)
    call = ready(tuples(model, args).recorded(), model)  # on the device, as a pipeline hands it over
    facts: dict = {}
    if forms == ["torchao"]:
        by_torchao(model)
    elif forms[0] not in ("bf16", *SVDQUANT):
        facts["kernels"] = by_rows(model, forms[0], args.codes)
    elif forms != ["bf16"]:
        facts["kernels"] = quantize_blocks(model, args.activations, args.rank)
    size = bytes_of(model)
    for form in forms:
        uncompiled(model)
        if form not in ("bf16", "torchao", "quantized") and "modules_fused" not in facts:
            facts["modules_fused"] = len(ptq4dm.fuse(model))
        if form in ("cached", "attention") and "cache" not in facts:
            before = model(*call.args, **call.kwargs)[0]
            cache = keep_weights({"": model}, bytes_of_text(args.weight_cache)).get("")
            size += 0 if cache is None else cache.nbytes
            facts |= {"cache": [] if cache is None else cache.lines()}
            facts["same_bits"] = torch.equal(model(*call.args, **call.kwargs)[0], before)
        faster = FasterAttention(model) if form.endswith("attention") else None
        for row in timed(model, call, args):
            facts |= {} if faster is None else {"attention": faster.lines()}
            key = key_of(form, args) | {"way": row["way"]}
            if not lines.has(**key):
                lines.add(key | {"bytes": size} | row | facts)


def key_of(form: str, args) -> dict:
    """What tells a form's rows from those of other options."""
    kept = {"weight_cache": args.weight_cache} if form in ("cached", "attention") else {}
    return {"form": form} | kept | ({"codes": args.codes} if form.startswith("w8a8") else {})


def bytes_of(model: nn.Module) -> int:
    """Of all tensors; those of torchao hold tensors of their own."""
    inner = [
        getattr(one, name)
        for one in model.parameters()
        if is_traceable_wrapper_subclass(one)
        for name in one.__tensor_flatten__()[0]
    ]
    plain = [one for one in model.parameters() if not is_traceable_wrapper_subclass(one)]
    return sum(one.nbytes for one in [*inner, *plain, *model.buffers()])


def timed(model: nn.Module, call: Call, args) -> Iterator[dict]:
    """A row for each way, as it is measured: those that need no compiling first."""
    yield {"way": "eager"} | step(model, call, args.repeats)
    if args.no_compile:
        return
    start = time.perf_counter()
    model.compile_repeated_blocks(fullgraph=True)
    model(*call.args, **call.kwargs)
    compiling = time.perf_counter() - start
    yield {"way": "compiled", "compiling_seconds": round(compiling, 1)} | step(model, call, args.repeats)
    if torch.cuda.is_available():
        replayed = stopwatch.in_a_graph(lambda: model(*call.args, **call.kwargs), args.repeats)
        yield {"way": "graph", "ms": replayed / 1e3}
        done = ptq4dm.optimize(model, fused=False, compiled=False)  # which they are, where the form is so
        yield {"way": "optimized"} | step(model, call, args.repeats)
        done.undo()
        yield {"way": "profile", "profile": profile(model, call)}


def profile(model: nn.Module, call: Call, most: int = 16) -> dict[str, float]:
    """Milliseconds by kernel of one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(*call.args, **call.kwargs)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return {f"{e.count} x {e.key[:80]}": round(e.self_device_time_total / 1e3, 3) for e in events[:most]}


def by_torchao(model: nn.Module) -> None:
    """All Linear layers of the blocks in torchao's fp8, a scale a row, in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(model, config, lambda layer, name: type(layer) is nn.Linear and "blocks." in name)


def table(rows: list[dict]) -> str:
    """Milliseconds of a step by form and way; how many times faster a form's graph is than others'; bytes.

    What was not measured of a form is "-"; forms of which nothing was are left out.
    """
    ms = {(row["form"], row["way"]): row.get("ms") for row in rows}
    size = {row["form"]: row["bytes"] for row in rows}
    widths, lines = (10, 10, 10, 12, 17, 14, 17, 8), []
    for form in (form for form in FORMS if form in size):
        cells = ["-" if ms.get((form, way)) is None else f"{ms[form, way]:.1f}" for way in WAYS]
        others = [ms.get(pair) for pair in (("bf16", "compiled"), ("bf16", "graph"), ("torchao", "graph"))]
        graph = ms.get((form, "graph"))
        cells += ["-" if None in (time, graph) else f"{time / graph:.2f}" for time in others]
        lines.append((form, *cells, f"{size[form] / 1e9:.2f}"))
    head = ("ms of a step", *WAYS, "x bf16 compiled", "x bf16 graph", "x torchao graph", "GB")
    return "\n".join(f"{name:22}" + "".join(map("{:>{}}".format, cells, widths)) for name, *cells in [head, *lines])


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
    parser.add_argument("--codes", choices=("int8", "fp8"), default="int8", help="of the form w8a8")
    parser.add_argument("--weight-cache", default="13GB", help="of the form cached")
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument("--forms", nargs="+", choices=FORMS)
    parser.add_argument("--output", type=Path, default=Path("out/bench-flux.jsonl"))
    args = parser.parse_args()
    args.num_tuples, on_cpu = 1, args.device == "cpu"
    if on_cpu and tuple(args.blocks) == BLOCKS:
        raise UserError("12 billion weights are for a GPU; a CPU takes a slice: --blocks 1 1 --heads 2 --tokens 64.")
    if on_cpu and any(form.endswith("attention") for form in args.forms or ()):
        raise UserError("no kernel of 8-bit attention serves a CPU: leave the forms of attention out of --forms.")
    if min(args.heads, args.repeats, args.tokens, args.text_tokens, sum(args.blocks)) < 1 or min(args.blocks) < 0:
        raise UserError("--heads, --repeats, --tokens, --text-tokens and the sum of --blocks are 1 or more.")
    if int(args.tokens**0.5) ** 2 != args.tokens:
        raise UserError(f"--tokens of an image are a square number, such as 4096; got {args.tokens}.")
    bytes_of_text(args.weight_cache)
    args.forms = args.forms or [form for form in FORMS if not (on_cpu and form.endswith("attention"))]
    names = ("blocks", "heads", "tokens", "text_tokens", "activations", "rank")
    sizes = {name: list(value) if name == "blocks" else value for name in names for value in [getattr(args, name)]}
    there = importlib.util.find_spec("torchao") is not None
    versions = {"torch": torch.__version__, "torchao": importlib.metadata.version("torchao") if there else None}
    lines = Lines(args.output, made_on(args.device) | versions | sizes)
    last = "eager" if args.no_compile else "profile" if torch.cuda.is_available() else "compiled"
    left = [form for form in args.forms if not lines.has(**key_of(form, args), way=last)]
    left = [form for form in left if form != "torchao" or there]
    for forms in [("bf16",), ("torchao",), SVDQUANT, *BY_ROWS]:
        if wanted := [form for form in forms if form in left]:
            measure(wanted, lines, args)
            torch._dynamo.reset()
            free_memory(args.device)
    print(table(lines.rows))


if __name__ == "__main__":
    run(main)
