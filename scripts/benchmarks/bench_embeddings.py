"""Time a step of a model whose embedding layers are as they were, in planes of signs, or not run: LUT-GEMM's rival.

    python scripts/benchmarks/bench_embeddings.py [--model dit-cifar10] [--batch-size 1 16] [--bits 3] [--threads 1]
        [--json scripts/results/embeddings-cpu.json]

Milliseconds of one call of the denoiser on a CPU in float32, medians. The three take turns; one thread is timed by
its own clock.

    exact     the model
    planes    LUTGEMMConfig(bits), all other layers as they were
    kept      the model within `ptq4dm.cached_embeddings`, on a step that it has had before

Beside the times: bytes of the embedding layers' weights in each, and of the outputs that are kept for one step. Of S
steps and batches of C conditions there are S C of these.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from pathlib import Path

import torch
from bench_cpu_w4 import machine, medians
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparisons"))
from conditions import commit  # noqa: E402

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.files.atomic import replacing
from ptq4dm.layers.binary.bcq import BCQLinear
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.load import load_reference

CLASS, TIME = 3, 500


def inputs_of(model: nn.Module, batch: int) -> dict:
    """A call of a batch of one time, and of one class where the model has classes, as a step of a schedule is."""
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {"timestep": torch.full((batch,), TIME), "return_dict": False}
    if hasattr(model, "transformer_blocks"):
        return found | {"hidden_states": x, "class_labels": torch.full((batch,), CLASS)}
    return found | {"sample": x}


def held(model: nn.Module, names: list[str]) -> int:
    return sum(one.numel() * one.element_size() for name in names for one in model.get_submodule(name).parameters())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = load_reference(args.model)
    exact = denoiser(pipe).eval()
    planes, kept, results = copy.deepcopy(exact), copy.deepcopy(exact), []
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=8, num_inference_steps=4))
    ptq4dm.quantize(planes, ptq4dm.LUTGEMMConfig(bits=args.bits, rounding="nearest"), store)  # times are of any codes
    names = [name for name, one in planes.named_modules() if isinstance(one, BCQLinear)]
    for batch in args.batch_size:
        inputs = inputs_of(exact, batch)
        with ptq4dm.cached_embeddings(kept) as cache:
            models = {"exact": exact, "planes": planes, "kept": kept}
            times = medians({name: functools.partial(one, **inputs) for name, one in models.items()})
        row = {
            "model": args.model, "device": machine(), "commit": commit(), "threads": args.threads,
            "batch_size": batch, "bits": args.bits,
            "milliseconds": {name: round(spent, 2) for name, spent in times.items()},
            "speedup": {name: round(times["exact"] / times[name], 3) for name in ("planes", "kept")},
            "layers": len(names), "layers_kept": len(cache.layers), "bytes_exact": held(exact, names),
            "bytes_planes": held(planes, names), "bytes_of_a_step": cache.most_bytes,
        }  # fmt: skip
        results.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
