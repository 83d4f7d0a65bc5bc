"""Transformer blocks of well-known models in 4 and in 8 bits, before and after ptq4dm.fuse, against bf16 and torchao.

    python scripts/benchmarks/bench_blocks.py --output out/blocks.jsonl                # one GPU
    python scripts/benchmarks/bench_blocks.py --models wan sdxl --forms bf16 svdq-fused

A block of published size with random weights is called as its model calls it at 1024 pixels (block_models.py says of
what). What is fed tokens is quantized, in all forms the same layers; embeddings and modulations stay in bf16.

    bf16            the block as it is
    torchao-fp8     torchao's dynamic fp8 by rows, where torchao is installed
    svdq            W4A8 with a branch of rank 32: SVDQuant with fp8 activations
    w8a8            int8 weights under dynamic int8 inputs
    progressive     QServe's 4 bits under dynamic int8 inputs
    ...-fused       the same after ptq4dm.fuse

Microseconds of a call: as it is written ("eager", wall time), compiled by torch.compile ("compiled", wall time), and
compiled in a CUDA graph ("graph", time of the GPU); medians. `error`: of the output beside bf16's, as a share of its
norm. Rounding is to nearest without calibration, which changes no time.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from pathlib import Path

import torch
from bench_common import Lines, error, made_with
from block_models import MODELS, Size, first_blocks
from torch import nn

import ptq4dm
from ptq4dm.errors import UserError, run
from ptq4dm.kernels.tuning import stopwatch
from ptq4dm.layers.base import replace_module
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.svdquant.group import Group, split_weight
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.packing import build_layer

FORMS = ("bf16", "torchao-fp8", "svdq", "svdq-fused", "w8a8", "w8a8-fused", "progressive", "progressive-fused")
WAYS = ("eager", "compiled", "graph")


def blocks_of(name: str, size: Size, device: str) -> dict[str, tuple[nn.Module, tuple, dict]]:
    """{name of a list of blocks: (its first block, args and kwargs of its call)}."""
    torch.manual_seed(0)
    with torch.device(device):
        model, call = MODELS[name](size)
    model = randomized(model.to(torch.bfloat16).eval().requires_grad_(False))
    seen: dict[str, tuple] = {}

    def noted(which: str, block: nn.Module):
        def hook(module, args, kwargs):
            seen[which] = (block, args, kwargs)

        return block.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [noted(which, block) for which, block in first_blocks(model).items()]
    model(**{name: halved(value) for name, value in call.items()})
    for handle in handles:
        handle.remove()
    return seen


def halved(value):
    """Latents and texts in bf16; times and places as they are."""
    if isinstance(value, list):
        return [halved(one) for one in value]
    floats = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.to(torch.bfloat16) if floats and value.ndim > 1 and value.shape[-1] > 4 else value


def randomized(model: nn.Module) -> nn.Module:
    """Random weights, also where a fresh model has zeros; those of norms about 1."""
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1))
    return model


def fed_tokens(block: nn.Module, args: tuple, kwargs: dict) -> list[list[str]]:
    """Names of the Linear layers that are fed tokens, those of one input together."""
    groups: dict[int, list[str]] = {}
    kept, handles = [], []
    for name, layer in block.named_modules():
        if type(layer) is nn.Linear:

            def hook(module, inputs, name=name):
                kept.append(inputs[0])  # as long as it lives, its id is its own
                if inputs[0].ndim > 1 and inputs[0].shape[-2] > 1 and inputs[0].shape[-1] % 64 == 0:
                    groups.setdefault(id(inputs[0]), []).append(name)

            handles.append(layer.register_forward_pre_hook(hook))
    block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return list(groups.values())


def quantized(block: nn.Module, groups: list[list[str]], form: str) -> nn.Module:
    """A copy of the block in this form, not fused."""
    block = copy.deepcopy(block)
    for names in groups:
        layers = [block.get_submodule(name) for name in names]
        if form.startswith("svdq"):
            made = svdq_layers(layers, names[0])
        else:
            made = [plain_layer(layer, form) for layer in layers]
        for name, layer in zip(names, made, strict=True):
            replace_module(block, name, layer)
    return block


def plain_layer(layer: nn.Linear, form: str) -> nn.Module:
    plan = LayerPlan(objective="max") if form.startswith("w8a8") else ProgressivePlan(objective="max")
    return quantized_copy(layer, plan, "layer")


def svdq_layers(layers: list[nn.Linear], leader: str) -> list[nn.Module]:
    plan = SVDQPlan(rank=32, group_size=64, activation="fp8")
    weight = torch.cat([layer.weight.float() for layer in layers])
    group = Group(weight, weight, torch.ones_like(weight[0]), plan, layers[0].weight.dtype)
    split = split_weight(group, group.peak)
    made: list[nn.Module] = []
    start = 0
    for layer in layers:
        rows = slice(start, start + layer.out_features)
        own = SVDQPlan(**{**vars(plan), "lender": leader}) if made else plan
        made.append(build_layer(layer, own, split, rows, layer.weight.dtype, made[0] if made else None))
        start = rows.stop
    return made


def in_torchao(block: nn.Module, groups: list[list[str]]) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    block, names = copy.deepcopy(block), {name for names in groups for name in names}
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(block, config, filter_fn=lambda _, name: name in names)
    return block


def answer(out):
    """The tensors that a block gives, as one."""
    return torch.cat(
        [one.flatten().float() for one in (out if isinstance(out, tuple) else (out,)) if one is not None]
    )


def wall(call, repeats: int) -> float:
    """Median microseconds of calls, one after the other, until the GPU is done."""
    times = []
    for _ in range(repeats + 3):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[3:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(block: nn.Module, args: tuple, kwargs: dict, options) -> dict:
    def call():
        return block(*args, **kwargs)

    figures = {"eager": wall(call, options.repeats)}
    if "compiled" in options.ways:
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True)

        def call():
            return compiled(*args, **kwargs)

        figures["compiled"] = wall(call, options.repeats)
    if "graph" in options.ways and torch.cuda.is_available():
        figures["graph"] = stopwatch.in_a_graph(call, options.repeats)
    return {name: round(value, 1) for name, value in figures.items()}


def measure_block(lines: Lines, name: str, block: nn.Module, args: tuple, kwargs: dict, options) -> None:
    groups = fed_tokens(block, args, kwargs)
    if not groups:
        raise UserError(f"{name}: no Linear is fed tokens of widths that 64 divides, so that nothing is quantized.")
    exact, made, rows = answer(block(*args, **kwargs)), {}, []
    for form in options.forms:
        if lines.has(model=name, form=form):
            continue
        kind, _, fused = form.partition("-fused")
        if form == "bf16":
            one = block
        elif form == "torchao-fp8":
            if importlib.util.find_spec("torchao") is None:
                continue
            one = in_torchao(block, groups)
        else:
            one = made.pop(kind, None) or quantized(block, groups, kind)
            made = {kind: one}
        row = {"model": name, "form": form, "layers": sum(map(len, groups)), "inputs": len(groups)}
        if "-fused" in form:
            report = ptq4dm.fuse(nn.ModuleDict({"block": one}))
            one(*args, **kwargs)
            row["fused"] = [line for line in str(report).splitlines() if line.startswith("fused")]
        row["error"] = round(error(answer(one(*args, **kwargs)), exact), 5)
        try:
            row |= measure(one, args, kwargs, options)
        except Exception as problem:  # the other rows are worth having
            row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
        lines.add(row)
        rows.append(row)


def table(rows: list[dict]) -> str:
    """Times of each form over those of bf16 in the same way: below 1 is faster."""
    out = [f"{'x bf16':34}" + "".join(f"{way:>10}" for way in WAYS) + f"{'error':>9}"]
    for row in rows:
        base = next((one for one in rows if (one["model"], one["form"]) == (row["model"], "bf16")), {})
        cells = [f"{row[way] / base[way]:10.2f}" if way in row and way in base else f"{'-':>10}" for way in WAYS]
        out.append(f"{row['model'] + ' ' + row['form']:34}" + "".join(cells) + f"{row.get('error', 0):9.4f}")
    return "\n".join(out)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--heads", type=int, help="fewer than the model has, for a look on a CPU")
    parser.add_argument("--side", type=int, help="rows of image tokens")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("out/blocks.jsonl"))
    options = parser.parse_args()
    if "graph" in options.ways and options.device == "cpu":
        options.ways.remove("graph")
        print("a CPU has no CUDA graphs: the way 'graph' is left out")
    lines = Lines(options.output, made_with())
    for name in options.models:
        seen = blocks_of(name, Size(options.heads, options.side, options.frames), options.device)
        for which, (block, args, kwargs) in seen.items():
            label = name if len(seen) == 1 else f"{name} {which}"
            measure_block(lines, label, block, args, kwargs, options)
        del seen
    print(table(lines.rows))


if __name__ == "__main__":
    run(main)
