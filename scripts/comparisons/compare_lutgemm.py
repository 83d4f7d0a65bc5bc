"""LUT-GEMM's rows where calibration has all that its layers are ever fed: each time of a schedule with each class.

    python scripts/comparisons/compare_lutgemm.py [--model dit-cifar10] [--rows "LUT-GEMM q2 g128" ...]
        [--steps 20] [--num-paired 32] [--output out/lutgemm.json] [--device cuda] [--workers 8]

Layers of time and class embeddings look at no picture: on one schedule they are fed as many rows as there are
pairs of a time and a class, 200 for 20 steps of a model of ten classes. In compare_methods.py calibration draws pairs
at random, 256 tuples have 72 % of these, and what is not among them errs the most. Here the model is recorded on
noise with each pair once, in pictures of a quarter of the side, for these layers do not see them; errors of the
predicted noise are those of held-out tuples of the sampler, whose pairs calibration has had.

A row of rows/sign_planes.py at a time; its bytes are those of all tensors in float16, and those of the layers in
planes, biases aside. Rows in the output are not made again. Error over bytes, 1 to 4 bits in every group size, and
uniform grids of as many bits:

    --rows "LUT-GEMM q? g??" "LUT-GEMM q? g128" "LUT-GEMM q? row" "LUT-GEMM q? *, uniform"
        "LUT-GEMM q? g128, uniform g*[0-9]"
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from conditions import bytes_of_float16, free_memory, made_on
from long_runs import add_options, named, shard_of
from paired import held_out
from rows.row import Row
from rows.sign_planes import sign_planes
from torch import nn
from workers import Task, check_workers, join_shards, measure_rows

import ptq4dm
from ptq4dm.calibration.calls import Calls
from ptq4dm.errors import UserError, run
from ptq4dm.files.rows import Rows
from ptq4dm.layers.binary.bcq import BCQLinear
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.devices import check_device

SETTINGS = ("steps", "num_paired")
USUAL = ("LUT-GEMM q2 g128", "LUT-GEMM q2 g128, uniform g128", "LUT-GEMM q2 g128, uniform g32")


def pairs(pipe, steps: int) -> Iterator[dict]:
    """Calls of noise, one for each time of the schedule, with a row for each class where the model has classes."""
    model, generator = denoiser(pipe), torch.Generator().manual_seed(0)
    pipe.scheduler.set_timesteps(steps)
    classes, size = getattr(model.config, "num_embeds_ada_norm", None), model.config.sample_size // 4
    for step in pipe.scheduler.timesteps.to(model.device):
        noise = torch.randn(classes or 1, model.config.in_channels, size, size, generator=generator).to(model.device)
        call = {"timestep": step.expand(len(noise)), "return_dict": False}
        if classes is None:
            yield call | {"sample": noise}
        else:
            yield call | {"hidden_states": noise, "class_labels": torch.arange(classes, device=model.device)}


@torch.no_grad()
def recorded(pipe, steps: int) -> tuple[Calls, int]:
    """Those calls, and how many rows they have together."""
    model, rows = denoiser(pipe).eval(), 0
    with ptq4dm.record(model) as calls:
        for call in pairs(pipe, steps):
            model(**call)
            rows += len(call["timestep"])
    return calls, rows


def in_planes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the layers in planes without their biases, and of their weights in float16."""
    layers = [layer for layer in model.modules() if isinstance(layer, BCQLinear)]
    own = sum(stored_bytes(layer) - (0 if layer.bias is None else layer.bias.nbytes) for layer in layers)
    return own, sum(2 * math.prod(layer.weight_shape) for layer in layers)


class Bench:
    """One model, the calls that it is calibrated on and its truth, each made once."""

    def __init__(self, model: str, args) -> None:
        self.model, self.device = model, args.device
        pipe = ptq4dm.load_reference(model, device=args.device)
        self.calls, self.tuples = recorded(pipe, args.steps)
        self.truth = held_out(pipe, args.num_paired, args.steps, 16)


def measure(bench: Bench, name: str, known) -> dict:
    """The row of a task; known: all rows that are there."""
    free_memory(bench.device)
    recipe, truth = next(row for row in planes() if row.name == name).recipe(), bench.truth
    start, model = time.perf_counter(), copy.deepcopy(truth.exact)
    ptq4dm.quantize(model, recipe, bench.calls)
    seconds = time.perf_counter() - start
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # of convolutions, more than these errors
        predicted = truth.predicted(model)
    size, whole = bytes_of_float16(model), bytes_of_float16(truth.exact)
    own, weights = in_planes(model)
    return {"model": bench.model, "row": name} | predicted | {
        "recipe": recipe.summary(), "tuples": bench.tuples, "bytes": size, "bytes_share": size / whole,
        "plane_bytes": own, "plane_share": own / weights,
        "seconds_to_quantize": round(seconds, 1), "seconds": round(time.perf_counter() - start, 1),
    } | made_on(bench.device)  # fmt: skip


def planes() -> list[Row]:
    """The rows that one recipe makes, nothing shuffled after it."""
    return [row for row in sign_planes() if row.packed is None]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10", help="an embedded model")
    parser.add_argument("--rows", nargs="+", default=list(USUAL), metavar="NAME", help="names or patterns of rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--num-paired", type=int, default=32, help="held-out tuples")
    add_options(parser, stores=False)
    parser.add_argument("--output", type=Path, default=Path("out/lutgemm.json"))
    args = parser.parse_args(words)
    if args.steps < 1 or args.num_paired < 1:
        raise UserError("--steps and --num-paired are 1 or more.")
    check_device(args.device)
    check_workers(args)
    index, count = shard_of(args.shard)
    rows = named(planes(), args.rows)[index::count]
    results = Rows(args.output, {name: getattr(args, name) for name in SETTINGS})
    join_shards(results)
    done = {(row["model"], row["row"]) for row in results}
    tasks = [Task(args.model, row.name, row.name) for row in rows if (args.model, row.name) not in done]
    remaining, failed = measure_rows(tasks, results, measure, args, Bench)
    for row in results:
        shares = f"{row['bytes']:,} bytes, planes {row['plane_share']:.3f} of float16"
        print(f"{row['model']}: {row['row']}: {row['eps_error']:.3e}, {shares}, {row['seconds']} s")
    for name, why in failed.items():
        print(f"left out: {name}: {why}")
    if remaining:
        print(f"{remaining} rows are still to do; the same command goes on with them.")


if __name__ == "__main__":
    run(main)
