"""What it costs to split inputs at seams: one forward of the UNet with and without, float32 beside, and each layer.

    python scripts/benchmarks/bench_split.py [--model unet-cifar10] [--batch-size 1 16] [--threads 1] [--device cpu]
        [--json out/split.jsonl]

The three models take turns in one run, so that whatever else the machine does falls on all; figures are ratios of
medians. Then each split layer by itself, on inputs of the shape that the model feeds it, beside the whole layer.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from bench_common import commit
from bench_cpu_w4 import machine
from bench_int8 import timed

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.files.atomic import replacing
from ptq4dm.hooks import hooked, input_of
from ptq4dm.layers.split.choices import SplitChoices
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.devices import check_device
from ptq4dm.pipelines.load import load_reference


def medians(models: dict, inputs: dict, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of one forward of each, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 3):
        for name, model in models.items():
            spent = timed(model, inputs, device)
            if turn >= 3:
                found[name].append(spent)
    return {name: statistics.median(times) for name, times in found.items()}


def layers(whole, split, inputs: dict, device: torch.device, rounds: int) -> dict[str, dict]:
    """Of each split layer: its shape, and its time over that of the same layer with a whole input."""
    fed: dict[str, torch.Tensor] = {}
    names = [n for n, one in split.named_modules() if isinstance(getattr(one, "plan", None), SplitChoices)]
    keep = {n: lambda _, args, kwargs, n=n: fed.update({n: input_of(args, kwargs)}) for n in names}
    with hooked(split, keep):
        split(**inputs)
    found = {}
    for name in names:
        pair = {"whole": whole.get_submodule(name), "split": split.get_submodule(name)}
        times = medians(pair, {"input": fed[name]}, device, rounds)
        shape = "x".join(map(str, pair["split"].weight_shape))
        found[name] = {
            "weight": shape,
            "pixels": fed[name].shape[2:].numel(),
            "ratio": times["split"] / times["whole"],
        }
    return found


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="a file for the lines, one a batch size")
    args = parser.parse_args()
    device = check_device(args.device)
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = load_reference(args.model, dtype=dtype, device=device)
    exact = denoiser(pipe).eval()
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=8, num_inference_steps=4))
    whole, split = copy.deepcopy(exact), copy.deepcopy(exact)
    ptq4dm.quantize(whole, ptq4dm.RTNConfig(), store)
    ptq4dm.quantize(split, ptq4dm.RTNConfig(split_inputs=True), store)
    models = {"exact": exact, "whole": whole, "split": split}
    exact.to(memory_format=torch.channels_last)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    lines = []
    for batch in args.batch_size:
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
        inputs = {"sample": x, "timestep": torch.full((batch,), 500, device=device), "return_dict": False}
        times = medians(models, inputs, device, args.rounds)
        row = {
            "model": args.model, "card": card, "commit": commit(), "dtype": str(dtype).removeprefix("torch."),
            "threads": args.threads, "batch_size": batch, "milliseconds": times,
            "split_over_whole": times["split"] / times["whole"],
            "speedup_whole": times["exact"] / times["whole"],
            "speedup_split": times["exact"] / times["split"],
            "layers": layers(whole, split, inputs, device, args.rounds),
        }  # fmt: skip
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.json) as path:
                path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(main)
