"""What gives the same bits: calibration and codes under other numbers of threads, batch sizes and devices.

    python scripts/comparisons/same_bits.py --model unet-cifar10 --output out/same-bits-unet.json
    python scripts/comparisons/same_bits.py --model unet-cifar10 --device cuda --output out/same-bits-unet-gpu.json

Each row compares one condition with the reference: one thread of the CPU, batches of 16.

    store    the same seeds collected again: recorded times, sampled tensors, ends of input ranges, static scales
    codes    one store, one recipe, packed again: share of codes and of scales that differ, and the epsilon error
             (held-out calls, against full precision) of both, each run on its own device

Rows already in the output are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from conditions import commit, device_name

import ptq4dm
from ptq4dm.calibration.record import tensors_of
from ptq4dm.calibration.sampled import record_calls
from ptq4dm.errors import run
from ptq4dm.evaluation.paired import EpsilonError
from ptq4dm.files.rows import Rows
from ptq4dm.layers.base import is_quantized
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.progress import progress_bar

HELD_OUT = 1_000_000  # first seed that calibration never uses
NUM_HELD_OUT = 64
RECIPES = {
    "RTN": ptq4dm.RTNConfig(activations="dynamic"),
    "RTN fp8": ptq4dm.RTNConfig(activations="dynamic", format="fp8"),
    "PTQ4DM, max": ptq4dm.PTQ4DMConfig(objective="max"),
    "PTQ4DM, percentile": ptq4dm.PTQ4DMConfig(objective="percentile"),
    "PTQ4DM, mse": ptq4dm.PTQ4DMConfig(objective="mse"),
    "PTQ4DM, lp 2.4": ptq4dm.PTQ4DMConfig(objective="lp"),
    "PTQ4DM, 4-bit weights, g32": ptq4dm.PTQ4DMConfig(weight_bits=4, group_size=32),
    "PTQ4DM, 4-bit weights, g32, Hessian": ptq4dm.PTQ4DMConfig(weight_bits=4, group_size=32, rounding="gptq"),
    "GradPTQ, 4-bit weights, 5 steps": ptq4dm.GradPTQConfig(activations="dynamic", steps=5, num_tuples=32),
    "SVDQuant": ptq4dm.SVDQuantConfig(),
}


@dataclass(frozen=True)
class Condition:
    """Where and how something is made."""

    device: str = "cpu"
    threads: int = 1
    batch_size: int = 16

    def __str__(self) -> str:
        place = f"{self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else self.device
        return f"{place}, batches of {self.batch_size}"


REFERENCE = Condition()


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def collected(model: str, where: Condition, args) -> ptq4dm.CalibrationStore:
    config = ptq4dm.CalibrationConfig(
        num_samples=args.calibration_samples, num_inference_steps=args.steps, batch_size=where.batch_size
    )
    with threads(where.threads):
        return ptq4dm.collect(ptq4dm.load_reference(model, device=where.device), config)


def different(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of values that are not the same to the bit."""
    return float((one.cpu() != other.cpu()).double().mean())


def compare_stores(pipe, one, other) -> dict:
    """The figures of a row on calibration."""
    network = denoiser(pipe)
    config = RECIPES["PTQ4DM, lp 2.4"]
    a, b = (samples_of(store) for store in (one, other))
    ranges = [store.statistics.high - store.statistics.low for store in (one, other)]
    reach = (ranges[0] - ranges[1]).abs() / ranges[0].abs()
    scales = []
    for store in (one, other):
        plan = config.resolve(network, ptq4dm.layers.view.find_layers(network), store)
        scales.append(torch.tensor([choice.input_scale for choice in plan.values()], dtype=torch.float64))
    return {
        "times": different(one.recorded().timestep, other.recorded().timestep),
        "samples": different(a, b),
        "samples_largest": float((a - b).abs().max() / a.std()),
        "ranges": different(*ranges),
        "ranges_largest": float(reach[reach.isfinite()].max()),
        "input_scales": different(*scales),
        "input_scales_largest": float(((scales[0] - scales[1]).abs() / scales[0]).max()),
    }


def samples_of(store) -> torch.Tensor:
    """All recorded samples, in order."""
    leaves = [
        leaf for part in store.recorded().batches(64) for leaf in tensors_of((part.call().args, part.call().kwargs))
    ]
    return torch.cat([leaf.flatten() for leaf in leaves if leaf.is_floating_point()])


def packed(model: str, name: str, where: Condition, store):
    """A pipeline that is quantized under a condition."""
    pipe = ptq4dm.load_reference(model, device=where.device)
    with threads(where.threads):
        ptq4dm.quantize(pipe, copy.deepcopy(RECIPES[name]), store)
    return pipe


def grids_of(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(all codes, all scales) of a model, on the CPU."""
    codes, scales = [], []
    for layer in (module for module in model.modules() if is_quantized(module)):
        for key, value in layer.state_dict().items():
            value = value.cpu()
            if key == "qweight":
                packed = value.dtype == torch.uint8  # two codes in a byte
                codes += [value & 15, value >> 4] if packed else [value.view(torch.int8)]
            elif "scale" in key:
                scales.append(value.flatten().double())
    return torch.cat([part.flatten() for part in codes]), torch.cat(scales)


def epsilon_error(pipe, exact, calls) -> float:
    error = EpsilonError(1, pipe.scheduler.config.num_train_timesteps)
    error.update(denoiser(pipe), exact.to(denoiser(pipe).device), calls)
    return error.result()["overall"]


def conditions(args) -> list[Condition]:
    """What is compared with the reference; first the reference again."""
    more = [Condition(threads=count) for count in args.threads if count > 1]
    return [REFERENCE, *more, *([Condition(args.device)] if args.device != "cpu" else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--device", default="cpu", help="cuda: a GPU beside the CPU")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--output", type=Path, default=Path("out/same-bits.json"))
    args = parser.parse_args()
    settings = {"model": args.model, "calibration_samples": args.calibration_samples, "steps": args.steps, "seed": 0}
    about = {"device": device_name(args.device), "torch": torch.__version__, "commit": commit()}
    rows = Rows(args.output, settings, **about)
    done = {(row["what"], row["condition"]) for row in rows}
    exact = ptq4dm.load_reference(args.model)
    store = collected(args.model, REFERENCE, args)
    with threads(1):
        times = torch.linspace(0, 999, NUM_HELD_OUT).tolist()
        seeds = range(HELD_OUT, HELD_OUT + NUM_HELD_OUT)
        calls = record_calls(exact, seeds, times, num_inference_steps=args.steps)
    others = conditions(args)
    batches = [replace(REFERENCE, batch_size=size) for size in args.batch_sizes]
    todo = [("store", where) for where in (*others, *batches)] + [(n, w) for n in args.recipes for w in others]
    todo = [(what, where) for what, where in todo if (what, str(where)) not in done]
    made: dict[str, tuple] = {}
    for what, where in progress_bar(todo, desc="same bits", unit="row"):
        if what == "store":
            figures = compare_stores(exact, store, collected(args.model, where, args))
        else:
            if what not in made:
                first = packed(args.model, what, REFERENCE, store)
                made = {what: (*grids_of(denoiser(first)), epsilon_error(first, denoiser(exact), calls))}
            codes, scales, error = made[what]
            second = packed(args.model, what, where, store)
            again = grids_of(denoiser(second))
            figures = {
                "codes": different(codes, again[0]),
                "scales": different(scales, again[1]),
                "scales_largest": float(((scales - again[1]).abs() / scales.abs()).max()),
                "eps_error": [error, epsilon_error(second, denoiser(exact), calls)],
            }
            denoiser(exact).to("cpu")
        rows.add({"what": what, "condition": str(where), **figures})
    for row in rows:
        print(
            row["what"], "|", row["condition"], "|", {k: v for k, v in row.items() if k not in ("what", "condition")}
        )


if __name__ == "__main__":
    run(main)
