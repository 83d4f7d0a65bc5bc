"""W8A8 layers and whole models against bf16, on a GPU: one command checks and times everything.

    python scripts/benchmarks/bench_conv.py [--model dit-cifar10] [--batch-size 256] [--tune]
        [--only layers|model] [--json FILE]

Layers: cuDNN bf16 channels_last against what a quantized layer does, its input's quantization included, and against
the product alone on codes (what is left of it where the norm before it hands over codes). Medians of CUDA graph
replays over inputs that no cache holds. "of bf16" is the time of bf16 over the time of ours. Model: one step, eager,
compiled and in a CUDA graph, for bf16, both 8-bit formats and SVDQuant W4A8; answers are compared bit by bit.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ptq4dm
from ptq4dm.cli.benches.tune import check_gpu, tune
from ptq4dm.errors import run
from ptq4dm.kernels.tuning import launches_w8a8 as search_w8a8
from ptq4dm.kernels.tuning.cases import Case, Operands, cases_of, encoded
from ptq4dm.kernels.tuning.stopwatch import graph_of, launched, microseconds
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.kernels.w8a8 import reference, steps
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.load import load_reference

LIMIT = 4e-3  # relative error of a bf16 output


def layer_call(case: Case, operands: tuple, x: Tensor) -> Tensor:
    """What a quantized layer does, quantization of its input included."""
    if case.linear:
        return w8a8.w8a8_linear(x, *operands, 8)
    w = case.window
    return w8a8.w8a8_conv2d(x, *operands, 8, w.stride, w.padding, w.dilation, 1)


def full_precision_call(case: Case, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    w = case.window
    return F.linear(x, weight, bias) if case.linear else F.conv2d(x, weight, bias, w.stride, w.padding, w.dilation)


def product_call(case: Case, operands: tuple, codes: Tensor) -> Tensor:
    """The product alone, on codes that are there."""
    return steps.multiply(codes, case.window, steps.Parameters(*operands), torch.bfloat16)


def over(call, inputs: list) -> float:
    """Median microseconds of call(x), over the inputs."""
    return microseconds([lambda x=x: call(x) for x in inputs])


def bench_layer(case) -> dict:
    operands = Operands.of(case)
    inputs, half = operands.inputs, operands.weight.bfloat16()
    if half.ndim == 4:
        half = half.contiguous(memory_format=torch.channels_last)
    row = {"layer": case.name, "count": case.count, "GFLOP": case.operations / 1e9, "MB": case.floor_bytes / 1e6}
    row["bf16_us"] = over(lambda x: full_precision_call(case, half, operands.bias, x), inputs)
    for form in ("int8", "fp8"):
        quantized = operands.quantized(form)
        row[f"{form}_error"] = check(case, quantized, inputs[0])
        row[f"{form}_us"] = over(lambda x, q=quantized: layer_call(case, q, x), inputs)
        codes = [encoded(case, quantized, x) for x in inputs]
        row[f"{form}_product_us"] = over(lambda x, q=quantized: product_call(case, q, x), codes)
    dynamic = operands.quantized("int8", static=False)
    row["int8_dynamic_us"] = over(lambda x: layer_call(case, dynamic, x), inputs)
    return row


def check(case, quantized: tuple, x: torch.Tensor) -> float:
    """Relative error of the first and the last image against the formula in float64 on the CPU."""
    y, some = layer_call(case, quantized, x), [0, -1]
    operands = [t if t is None else t.cpu() for t in quantized]
    operands[2] = operands[2].float()
    if case.linear:
        expected = reference.linear(x[some].float().cpu(), *operands, 8)
    else:
        w = case.window
        expected = reference.conv2d(x[some].float().cpu(), *operands, 8, w.stride, w.padding, w.dilation, 1)
    return float((y[some].float().cpu() - expected).norm() / expected.norm())


def layer_table(rows: list[dict]) -> str:
    head = f"{'layer':<28}{'n':>3}{'bf16':>8}{'int8':>8}{'of bf16':>8}{'fp8':>8}{'of bf16':>8}"
    head += f"{'int8 mm':>9}{'TFLOP/s':>8}{'fp8 mm':>8}{'TFLOP/s':>8}{'dynamic':>8}{'TB/s':>6}"
    lines = [head]
    for r in rows:
        line = f"{r['layer']:<28}{r['count']:>3}{r['bf16_us']:>8.1f}"
        for form in ("int8", "fp8"):
            line += f"{r[f'{form}_us']:>8.1f}{r['bf16_us'] / r[f'{form}_us']:>8.2f}"
        for form, width in (("int8", 9), ("fp8", 8)):
            us = r[f"{form}_product_us"]
            line += f"{us:>{width}.1f}{r['GFLOP'] / us * 1e3:>8.0f}"
        best = min(r["int8_us"], r["fp8_us"])
        lines.append(line + f"{r['int8_dynamic_us']:>8.1f}{r['MB'] / best:>6.2f}")
    total = {
        k: sum(r[k] * r["count"] for r in rows)
        for k in ("bf16_us", "int8_us", "fp8_us", "int8_product_us", "fp8_product_us")
    }
    wrong = [f"{r['layer']} {f}" for r in rows for f in ("int8", "fp8") if not r[f"{f}_error"] < LIMIT]
    lines += [f"WRONG: {name}" for name in wrong]
    lines.append("all layers of a step, us: " + ", ".join(f"{k[:-3]} {v:.0f}" for k, v in total.items()))
    return "\n".join(lines)


def inputs_of(model, batch: int, device: str) -> tuple[torch.Tensor, ...]:
    """(noise, timestep) of unet-cifar10; (noise, timestep, labels) of dit-cifar10."""
    noise = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    time = torch.full((batch,), 500, device=device)
    classes = getattr(model.config, "num_embeds_ada_norm", None)
    return (noise, time) if classes is None else (noise, time, torch.arange(batch, device=device) % classes)


@torch.no_grad()
def bench_model(name: str, batch: int, compiled: bool) -> list[dict]:
    pipe = load_reference(name, dtype=torch.bfloat16, device="cuda")
    exact = denoiser(pipe).eval()
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=16, num_inference_steps=5))
    recipes = {form: ptq4dm.RTNConfig(format=form) for form in ("int8", "fp8")}
    plain = {"smoothing": "none", "rounding": "nearest", "refinements": 0}  # what is searched changes no time
    recipes["w4a8"] = ptq4dm.SVDQuantConfig(activations="fp8", num_tuples=2, **plain)
    models = {"bf16": copy.deepcopy(exact)}
    for form, recipe in recipes.items():
        models[form] = copy.deepcopy(exact)
        ptq4dm.quantize(models[form], recipe, store)
        fused = copy.deepcopy(models[form])
        if ptq4dm.fuse(fused):
            models[f"{form} fused"] = fused
    x, *rest = inputs_of(exact, batch, "cuda")
    x = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    rows, truth = [], None
    for form, model in models.items():
        kinds = {"eager": model}
        if compiled and f"{form} fused" not in models:
            kinds["compiled"] = torch.compile(model, fullgraph=True)
        for kind, one in kinds.items():
            call = lambda one=one: one(x, *rest).sample  # noqa: E731
            answer = call().clone()
            truth = answer if truth is None else truth
            row = {"model": form, "kind": kind, "ms": launched(call) / 1e3}
            graph, output = graph_of([call])
            row["graph_ms"] = launched(graph.replay) / 1e3
            first = output.clone()
            graph.replay()
            row["same_bits"] = bool(torch.equal(first, output)) and bool(torch.equal(first, answer))
            row["error"] = float((first.float() - truth.float()).norm() / truth.float().norm())
            rows.append(row)
            against = rows[0]
            print(
                f"{form:<11} {kind:<9} {row['ms']:8.3f} ms ({against['ms'] / row['ms']:.2f})   in a CUDA graph "
                f"{row['graph_ms']:8.3f} ms ({against['graph_ms'] / row['graph_ms']:.2f})   "
                f"same bits {row['same_bits']}   from bf16 {row['error']:.1e}",
                flush=True,
            )
    profile_graph(models.get("int8 fused", models["int8"]), x, *rest)
    return rows


def profile_graph(model, *inputs) -> None:
    """Where a model's time goes, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(*inputs)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    for e in events[:14]:
        print(
            f"  {e.self_device_time_total / total:6.1%} {e.self_device_time_total:9.0f} us {e.count:4d}  {e.key[:90]}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--only", choices=["layers", "model"])
    parser.add_argument("--tune", action="store_true", help="find the tiles for this GPU first")
    parser.add_argument("--budget", type=float, default=220, help="seconds for --tune")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    check_gpu()
    torch.backends.cudnn.benchmark = True
    model = denoiser(load_reference(args.model))
    cases = cases_of(model, lambda: model(*inputs_of(model, 1, "cpu")), args.batch_size)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "batch_size": args.batch_size}
    if args.tune:
        tune(search_w8a8.launches(cases), seconds=args.budget)

    def save():
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1))

    if args.only != "model":
        result["layers"] = []
        for case in cases:
            result["layers"].append(bench_layer(case))
            save()
        print(layer_table(result["layers"]), flush=True)
    if args.only != "layers":
        result["model"] = bench_model(args.model, args.batch_size, not args.no_compile)
    save()


if __name__ == "__main__":
    run(main)
