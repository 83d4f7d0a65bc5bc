"""Whether it pays that ranges of activations follow the timestep: by layer and timestep bin, beside one of a layer.

    python scripts/comparisons/compare_clipping.py --model dit-cifar10 --output out/clipping-dit.json
    python scripts/comparisons/compare_clipping.py --model unet-cifar10 --device cuda --num-paired 64 --steps 50

Weights have 8 bits throughout, so that the errors are those of activations. Dynamic ones are clipped at a ratio of
the largest value of each token (of each sample, in convolutions), static ones have a range of the values that
calibration saw, the least in lp. Ratios and ranges are of a layer, or of a layer and each of the timestep bins. The
ratio is the one of RATIOS whose output error on calibration calls is least. Control: each layer's ratios, or ranges,
dealt to its bins at random. If timesteps matter, what bins gain over one ratio must be gone there.

    eps_error      of held-out noise predictions, over all and by tenths of the timesteps
    psnr           of same-seed images, with its 95 % interval; without images (--no-images) it is not measured

Rows in the output are not made again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from conditions import calibration_folder
from controls import generator
from paired import NUM_BINS, Paired, held_out
from torch import Tensor, nn

import ptq4dm
from ptq4dm.calibration.measure import binned_batches, timestep_bins
from ptq4dm.calibration.record import replay
from ptq4dm.errors import run
from ptq4dm.evaluation.paired import EpsilonError, image_errors, paired_psnr
from ptq4dm.files.rows import Rows
from ptq4dm.hooks import hooked, input_of
from ptq4dm.kernels.formats.int8 import dynamic_scale
from ptq4dm.layers.base import is_quantized
from ptq4dm.ranges.inputs import activation_grid

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
OBJECTIVE = "lp"
SETTINGS = ("model", "steps", "num_paired", "no_images", "calibration_samples", "seed", "device")
KINDS = ("one", "by bin", "by bin, shuffled")


class Bins:
    """The timestep bin of a model's call, from its `timestep`; samples of a call share it."""

    def __init__(self, count: int, most: int) -> None:
        self.count, self.most, self.now = count, most, 0

    def called(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.now = self.of(float(torch.as_tensor(time).flatten()[0]) / self.most)

    def of(self, share: float) -> int:
        return int(timestep_bins(torch.tensor(share), self.count))


def clipped(x: Tensor, ratio: float, dims: tuple[int, ...]) -> Tensor:
    """x within a ratio of its largest magnitude over dims."""
    reach = ratio * x.abs().amax(dims, keepdim=True)
    return x.clamp(-reach, reach)


def sample_dims(layer: nn.Module) -> tuple[int, ...]:
    return (1, 2, 3) if isinstance(layer, nn.Conv2d) else (-1,)


def clip_errors(exact: nn.Module, store, bits: dict[str, int], bins: int) -> dict[str, Tensor]:
    """layer -> squared errors of its output [bins, RATIOS] float64 when only its input is rounded."""
    errors = {name: torch.zeros(bins, len(RATIOS), dtype=torch.float64) for name in bits}
    now = 0

    def look(name: str) -> Callable:
        layer = exact.get_submodule(name)
        dims, weight = sample_dims(layer), layer.weight.detach().float()

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs).float()
            for place, ratio in enumerate(RATIOS):
                near = clipped(x, ratio, dims)
                scale = dynamic_scale(near, dims, bits[name])
                wrong = (near / scale).round() * scale - x
                if isinstance(layer, nn.Conv2d):
                    off = F.conv2d(wrong, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                else:
                    off = F.linear(wrong, weight)
                errors[name][now, place] += float(off.square().sum(dtype=torch.float64))

        return hook

    with hooked(exact, {name: look(name) for name in bits}):
        for number, calls in binned_batches(store.recorded(), bins, store.config["batch_size"]):
            now = number
            replay(exact, calls)
    return errors


def dealt(values: list, place: int, seed: int) -> list:
    """A layer's values by bin, at random to its bins."""
    order = torch.randperm(len(values), generator=generator(seed, place)).tolist()
    return [values[i] for i in order]


def by_bin(of_bins: dict[str, list], one: dict[str, object], kind: str, seed: int) -> dict[str, list]:
    """layer -> what it has in each bin, for one of KINDS."""
    if kind == "one":
        return {name: [one[name]] * len(values) for name, values in of_bins.items()}
    if kind == "by bin":
        return of_bins
    return {name: dealt(values, place, seed) for place, (name, values) in enumerate(of_bins.items())}


def ratios(exact: nn.Module, store, bits: dict[str, int], bins: int) -> tuple[dict, dict]:
    """(layer -> ratio in each bin, layer -> the ratio of all)."""
    errors = clip_errors(exact, store, bits, bins)
    of_bins = {name: [RATIOS[int(row.argmin())] for row in table] for name, table in errors.items()}
    return of_bins, {name: RATIOS[int(table.sum(0).argmin())] for name, table in errors.items()}


def grids(store, bits: dict[str, int], bins: int) -> tuple[dict, dict]:
    """(layer -> (scale, zero point) in each bin, layer -> that of all)."""
    one = {name: activation_grid(*store.input_of(name), width, OBJECTIVE) for name, width in bits.items()}

    def of_bin(name: str, number: int) -> tuple[float, int]:
        histogram, limit, low, high = store.input_of(name, [number])
        if low > high:  # calibration has no call there
            return one[name]
        return activation_grid(histogram, limit, low, high, bits[name], OBJECTIVE)

    return {name: [of_bin(name, number) for number in range(bins)] for name in bits}, one


def hooks_of(model: nn.Module, table: dict[str, list], static: bool, clock: Bins) -> dict[str, Callable]:
    """Hooks before layers that set their grid, or clip their input, by the bin of the call."""

    def swap(name: str) -> Callable:
        layer = model.get_submodule(name)

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            scale, zero = table[name][clock.now]
            layer.input_scale.data.fill_(scale)
            layer.input_zero_point.data.fill_(zero)

        return hook

    def clip(name: str) -> Callable:
        dims = sample_dims(model.get_submodule(name))
        return lambda module, args, kwargs: ((clipped(args[0], table[name][clock.now], dims), *args[1:]), kwargs)

    return {name: (swap if static else clip)(name) for name in table} | {"": clock.called}


def measure(truth: Paired, model: nn.Module, clock: Bins, pictured: bool) -> dict:
    """The figures of a row, with those of images or without. Held-out calls go through the model bin by bin."""
    error = EpsilonError(NUM_BINS, clock.most)
    places = [clock.of(float(time)) for time in truth.calls.time]
    for number in sorted(set(places)):
        part = torch.tensor([i for i, place in enumerate(places) if place == number])
        calls = truth.calls[part]
        error.add(calls.time, truth.predict(model, calls), truth.eps[part])
    found = {
        "eps_error": error.result()["overall"],
        "eps_error_bins": [float(noise / signal) if signal else None for noise, signal, _ in error.sums],
    }
    if not pictured:
        return found
    images = torch.cat(list(truth.sample(model, truth.seeds, truth.steps)))
    pictures = paired_psnr(image_errors(images, truth.images))
    return found | {"psnr": pictures["psnr_db"], "psnr_interval": pictures["psnr_interval"]}


def recipe(static: bool, bits: int):
    if static:
        return ptq4dm.PTQ4DMConfig(activation_bits=bits, objective=OBJECTIVE)
    return ptq4dm.RTNConfig(activation_bits=bits, activations="dynamic")


def main(arguments: list[str] | None = None, pipe=None) -> None:
    """pipe: the model's pipeline, where it is there already."""
    args = parse(arguments)
    rows = Rows(args.output, {name: getattr(args, name) for name in SETTINGS}, {"inputs": str, "bits": int})
    done = {(row["inputs"], row["bits"], row["kind"]) for row in rows}
    pipe = pipe or ptq4dm.load_reference(args.model, device=args.device)
    config = ptq4dm.CalibrationConfig("solver", args.calibration_samples, args.steps, seed=args.seed)
    store = ptq4dm.collect(pipe, config, calibration_folder(args, args.model, "solver", config))
    truth = held_out(pipe, args.num_paired, args.steps, args.batch_size)
    clock = Bins(store.config["num_bins"], pipe.scheduler.config.num_train_timesteps)
    for inputs in args.inputs:
        for bits in args.bits:
            kinds = (*KINDS, "none") if inputs == "dynamic" else KINDS
            left = [kind for kind in kinds if (inputs, bits, kind) not in done]
            if left:
                _measure_all(rows, args, truth, store, clock, inputs, bits, left)
    print(table_of(rows))


def _measure_all(rows: Rows, args, truth: Paired, store, clock: Bins, inputs: str, bits: int, kinds: list) -> None:
    static, model = inputs == "static", copy.deepcopy(truth.exact)
    ptq4dm.quantize(model, recipe(static, bits), store)
    plans = {name: one.plan for name, one in model.named_modules() if is_quantized(one)}
    widths = {name: plan.activation_bits for name, plan in plans.items() if plan.static == static}
    found = grids(store, widths, clock.count) if static else ratios(truth.exact, store, widths, clock.count)
    for kind in kinds:
        chosen = {} if kind == "none" else by_bin(*found, kind, args.seed)
        with hooked(model, hooks_of(model, chosen, static, clock)):
            figures = measure(truth, model, clock, not args.no_images)
        rows.add({"inputs": inputs, "bits": bits, "kind": kind, "layers": len(widths), **figures})
        print(table_of(rows[-1:]).splitlines()[-1], flush=True)


def table_of(rows: list[dict]) -> str:
    """A Markdown table, a line a row."""
    lines = ["| inputs | bits | ranges | epsilon error | PSNR dB |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row.get("psnr_interval", (0, 0))
        psnr = f"{row['psnr']:.2f} ({low:.2f} to {high:.2f})" if "psnr" in row else "not measured"
        lines.append(f"| {row['inputs']} | {row['bits']} | {row['kind']} | {row['eps_error']:.3e} | {psnr} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dit-cifar10", help="an embedded model")
    parser.add_argument("--inputs", nargs="+", default=["dynamic", "static"], choices=["dynamic", "static"])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6, 4], help="of activations")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--num-paired", type=int, default=16, help="held-out seeds")
    parser.add_argument("--no-images", action="store_true", help="epsilon errors alone, in a tenth of the time")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration and of what is shuffled")
    parser.add_argument("--stores", type=Path, help="folder of calibrations; beside --output")
    parser.add_argument("--output", type=Path, default=Path("out/clipping.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
