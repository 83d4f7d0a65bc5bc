"""One forward of the denoiser, full precision against real W8A8, timed side by side in one run.

    python scripts/benchmarks/bench_int8.py [--model unet-cifar10] [--batch-size 16] [--threads 2]

Calls alternate between the two models, so that whatever else the machine does falls on both; the figure is the
ratio of the medians. On a GPU the baseline is bfloat16, on a CPU float32; both run channels_last. A profile of the
int8 model by operator then says what limits it. What else a CPU can run a model by is in bench_cpu.py.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.pipelines.denoiser import class_count, denoiser
from ptq4dm.pipelines.devices import check_device
from ptq4dm.pipelines.load import load_reference


def timed(model, inputs, device) -> float:
    """Milliseconds of one forward."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(**inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    model(**inputs)
    return (time.perf_counter() - begin) * 1e3


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = check_device(args.device)
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    pipe = load_reference(args.model, dtype=dtype, device=device)
    exact = copy.deepcopy(denoiser(pipe)).eval()
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=16, num_inference_steps=5))
    report = ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), store)
    int8 = denoiser(pipe).eval()

    x = torch.randn(args.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    labels = {"class_labels": torch.arange(args.batch_size) % class_count(pipe)} if class_count(pipe) else {}
    first = next(iter(inspect.signature(int8.forward).parameters))
    inputs = {first: x, "timestep": torch.full((args.batch_size,), 500, device=device), "return_dict": False}
    inputs |= {name: value.to(device) for name, value in labels.items()}
    for model in (exact, int8) * 3:
        timed(model, inputs, device)
    pairs = [(timed(exact, inputs, device), timed(int8, inputs, device)) for _ in range(args.rounds)]
    full, quantized = (statistics.median(column) for column in zip(*pairs, strict=True))
    spread = statistics.quantiles([a / b for a, b in pairs], n=4)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {args.threads} threads"
    result = {
        "model": args.model,
        "device": name,
        "batch_size": args.batch_size,
        "baseline": str(dtype).removeprefix("torch."),
        "speedup": full / quantized,
        "speedup_quartiles": [spread[0], spread[2]],
        "bytes_ratio_to_float32": stored_bytes(int8) / (4 * sum(p.numel() for p in exact.parameters())),
        "kernels": sorted({row["kernel"] for row in report.layers}),
    }
    if device.type == "cuda":
        result["milliseconds"] = {"baseline": full, "int8": quantized}
    print(json.dumps(result, indent=1))

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        int8(**inputs)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = profiler.key_averages()
    times = {row.key: getattr(row, key.replace("cuda", "device"), 0) for row in rows}
    total = sum(times.values())
    print("\nwhere the int8 model's time goes:")
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:12]:
        print(f"  {spent / total:6.1%}  {name}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run(main)
