"""A FLUX-shaped slice in 4 and 8 bits on several GPUs: context parallelism of diffusers, a device map of accelerate.

    torchrun --nproc-per-node 2 scripts/benchmarks/bench_parallel.py --output out/parallel.jsonl

Of each form (bf16; W4A8 by SVDQuant and by QoQ, and int8 under dynamic inputs, all fused) the slice runs on one GPU;
then its tokens are split among all of them by diffusers' `enable_parallelism`, as Ulysses and as ring; then, in the
first process, its layers are split by accelerate's `infer_auto_device_map` and `dispatch_model`. `error`: of the
output beside that on one GPU, as a share of its norm. Milliseconds of a step, median; "compiled": with blocks
compiled by torch.compile; "graph": that in a CUDA graph, what GPUs say to each other within it, or why there is none.
With --device cpu two processes of gloo compare Ulysses alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from bench_common import Lines, error, made_with
from bench_flux import by_rows, fused_model, quantize_blocks
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import attention_backend
from flux_slice import tuples
from torch import nn

import ptq4dm
from ptq4dm.calibration.record import ready
from ptq4dm.errors import UserError, run
from ptq4dm.kernels.tuning import stopwatch

FORMS = ("svdq-fused", "w8a8-fused", "progressive-fused", "bf16")
WAYS = ("one", "ulysses", "ring", "device map")


def build(form: str, options) -> nn.Module:
    model = fused_model(options)
    if form == "bf16":
        return model
    if form == "svdq-fused":
        quantize_blocks(model, "fp8", 32)
    else:
        by_rows(model, form, "int8")
    ptq4dm.fuse(model)
    return model


def answer(model: nn.Module, call) -> torch.Tensor:
    return model(*call.args, **call.kwargs)[0].float()


def wait() -> None:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            torch.cuda.synchronize(i)


def milliseconds(model: nn.Module, call, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        model(*call.args, **call.kwargs)
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times[2:]), 2)


def spread(model: nn.Module, way: str) -> nn.Module:
    """The model by this way, in place."""
    if way == "device map":
        return dispatch_model(model, device_map(model, torch.cuda.device_count()))
    if way != "one":
        degree = dist.get_world_size()
        model.enable_parallelism(config=ContextParallelConfig(**{f"{way}_degree": degree}))
    return model


def in_a_graph(model: nn.Module, call, repeats: int) -> float | str:
    """Milliseconds of a replay, or why there is none."""
    try:
        return round(stopwatch.in_a_graph(lambda: model(*call.args, **call.kwargs), repeats) / 1e3, 2)
    except RuntimeError as problem:
        return f"{type(problem).__name__}: {str(problem)[:200]}"


def device_map(model: nn.Module, gpus: int) -> dict[str, int]:
    """An equal share of the bytes for each GPU, and what is left for the last; of the first one accelerate keeps room
    for a largest block free."""
    blocks = model._no_split_modules
    sizes = compute_module_sizes(model)
    largest = max(sizes[name] for name, module in model.named_modules() if type(module).__name__ in blocks)
    places = {i: sizes[""] // gpus for i in range(gpus)} | {0: sizes[""] // gpus + largest, gpus - 1: sizes[""]}
    return infer_auto_device_map(model, places, no_split_module_classes=blocks)


def measure(form: str, way: str, exact, options) -> tuple[dict, torch.Tensor]:
    model = build(form, options)
    call = ready(tuples(model, options).recorded(), model)
    model = spread(model, way)
    y = answer(model, call).to(options.device)
    row = {"form": form, "way": way, "gpus": 1 if way == "one" else dist.get_world_size()}
    row["error"] = 0.0 if exact is None else round(error(y, exact), 6)
    row["eager"] = milliseconds(model, call, options.repeats)
    if options.compile and way != "device map":
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=way == "one")
        row["compiled"] = milliseconds(model, call, options.repeats)
        if options.device.startswith("cuda"):
            row["graph"] = in_a_graph(model, call, options.repeats)
    return row, y


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 8), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=4096, help="of the image, a square number")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="all of them; on a CPU one and ulysses")
    parser.add_argument("--backend", default="_native_cudnn", help="of attention in a ring, which needs its sums")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--output", type=Path, default=Path("out/parallel.jsonl"))
    options = parser.parse_args()
    options.num_tuples = 1
    if "RANK" not in os.environ:
        raise UserError("several processes are compared: start this by torchrun --nproc-per-node 2, of as many GPUs.")
    there = WAYS if options.device.startswith("cuda") else WAYS[:2]
    options.ways = options.ways or list(there)
    if away := [way for way in options.ways if way not in there]:
        raise UserError(f"{' and '.join(away)}: of GPUs alone.")
    rank = int(os.environ["RANK"])
    if options.device.startswith("cuda"):
        torch.cuda.set_device(rank)
        options.device = f"cuda:{rank}"
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    dist.init_process_group("nccl" if options.device.startswith("cuda") else "gloo")
    first = rank == 0
    lines = Lines(options.output, made_with()) if first else None
    for form in options.forms:
        exact = None
        for way in options.ways:
            dist.barrier()
            if way == "device map" and not first:
                continue  # one process has all GPUs
            try:
                with attention_backend(options.backend if way == "ring" else "native"):  # of this way alone
                    row, y = measure(form, way, exact, options)
            except Exception as problem:  # the others are worth having
                row, y = {"form": form, "way": way, "failed": f"{type(problem).__name__}: {str(problem)[:300]}"}, None
            exact = y if way == "one" else exact
            if lines is not None:
                lines.add(row)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
