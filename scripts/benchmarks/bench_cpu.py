"""One forward of the denoiser on a CPU by all that it can be run by, in one process: time and error.

    python scripts/benchmarks/bench_cpu.py [--model unet-cifar10] [--batch-sizes 16 1] [--threads 2] [--no-compile]

Candidates take turns, so that whatever else the machine does falls on all of them; a ratio is that of medians. NNCF
and OpenVINO are candidates where they are installed. Errors are |e_q - e|^2 / |e|^2, to the float32 model's output e,
on calls of held-out seeds in more steps than those of calibration: so some lie below its lowest timestep.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from cpu_candidates import candidates, labels_of, rows_of

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.load import load_reference

CALIBRATED, HELD_OUT = 20, 50  # steps
SEEDS, OTHER_SEEDS = list(range(1000, 1004)), list(range(4))


def singles(rows: list) -> list:
    """Calls of one sample, from calls of several."""
    parts = [(row, i) for row in rows for i in range(len(row[0]))]
    return [tuple(None if part is None else part[i : i + 1] for part in row) for row, i in parts]


def timed(call, inputs) -> float:
    begin = time.perf_counter()
    call(*inputs)
    return (time.perf_counter() - begin) * 1e3


def errors(call, exact, rows) -> list[float]:
    pairs = [(call(*row), exact(*row)) for row in rows]
    return [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nncf-rows", type=int, default=64, help="calls of one sample that NNCF calibrates on")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, help="a file to which a line for each candidate is added")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    pipe = load_reference(args.model)
    pipe.set_progress_bar_config(disable=True)
    exact = copy.deepcopy(denoiser(pipe)).eval().to(memory_format=torch.channels_last)
    calibration = ptq4dm.CalibrationConfig(num_samples=32, num_inference_steps=CALIBRATED)
    alone = singles(rows_of(pipe, SEEDS, CALIBRATED))
    seen = alone[:: max(1, len(alone) // args.nncf_rows)][: args.nncf_rows]  # of all times
    times = torch.linspace(0, HELD_OUT - 1, 12).round().long().tolist()
    sampled = rows_of(pipe, OTHER_SEEDS, HELD_OUT)
    held_out = [sampled[i] for i in times]
    store = ptq4dm.collect(pipe, calibration)
    ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), store)
    runs = {}
    for name, call in candidates(exact, denoiser(pipe).eval(), seen, not args.no_compile):
        runs[name] = call
        print(f"made: {name}", file=sys.stderr, flush=True)
    first = next(iter(runs.values()))
    found = {name: errors(call, first, held_out) for name, call in runs.items()}

    facts = {"model": args.model, "threads": args.threads, "cpu": processor(), "load": os.getloadavg()[0]}
    print(json.dumps(facts))
    for batch in args.batch_sizes:
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        inputs = (x, torch.full((batch,), 500), labels_of(pipe, batch))
        for call in list(runs.values()) * 3:
            timed(call, inputs)
        rounds = [{name: timed(call, inputs) for name, call in runs.items()} for _ in range(args.rounds)]
        print(f"\nbatch {batch:<31} {'ms':>8} {'x':>6} {'median error':>13} {'mean':>9}")
        base = statistics.median(one[next(iter(runs))] for one in rounds)
        for name in runs:
            spent = statistics.median(one[name] for one in rounds)
            middle, mean = statistics.median(found[name]), statistics.mean(found[name])
            print(f"{name:<37} {spent:8.2f} {base / spent:6.2f} {middle:13.1e} {mean:9.1e}", flush=True)
            row = {"batch": batch, "candidate": name, "ms": spent, "ratio": base / spent}
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(facts | row | {"median_error": middle, "mean_error": mean}) + "\n")


def processor() -> str:
    """The processor's name, and what it has for products of integers and bfloat16."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [one for one in ("avx512_vnni", "avx512_bf16", "amx_int8") if one in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.processor())} ({', '.join(flags)})"


if __name__ == "__main__":
    run(main)
