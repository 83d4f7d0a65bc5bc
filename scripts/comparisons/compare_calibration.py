"""What calibration and range objective are worth: the table of PTQ4DM in scripts/results/README.md.

    python scripts/comparisons/compare_calibration.py --model unet-cifar10 --device cuda
        --output out/calibration-unet.json

Rows: full precision; round-to-nearest calibrated at one timestep and over all; PTQ4DM with each collector x
{max, mse, lp 2.4}; at W8A8, and at W8A6 and W6A6 (simulated). Columns: same-seed PSNR and noise prediction error
against full precision on held-out seeds, and feature-FID. `--shard i/n` does every n-th row (to spread over GPUs);
rows already in the output are kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from paired import Paired

import ptq4dm
from ptq4dm.calibration.collect import draw_timesteps
from ptq4dm.errors import run
from ptq4dm.files.rows import Rows
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.load import load_reference
from ptq4dm.progress import progress_bar

SETTINGS = ("model", "steps", "num_fid", "num_paired", "calibration_samples")
BITS = {"W8A8": (8, 8), "W6A6": (6, 6), "W8A6": (8, 6)}


def rows() -> list[dict]:
    """Every row of the table, in the order it is printed."""
    table = [{"bits": "full", "method": "full precision", "collector": "", "objective": ""}]
    for bits in BITS:
        for collector in ("t=0", "t=T-1", "uniform"):
            table.append({"bits": bits, "method": "RTN", "collector": collector, "objective": "max"})
        for collector in ("uniform", "ndtc", "solver"):
            for objective in ("max", "mse", "lp"):
                if (collector, objective) != ("uniform", "max"):  # that is RTN's row
                    table.append({"bits": bits, "method": "PTQ4DM", "collector": collector, "objective": objective})
        table.append({"bits": bits, "method": "RTN dynamic", "collector": "", "objective": "max"})
    return table


def identity(row: dict) -> tuple:
    return tuple(row[key] for key in ("bits", "method", "collector", "objective"))


def calibration(collector: str, args) -> ptq4dm.CalibrationConfig:
    law = {"t=0": ("ndtc", 0.0, 0.0), "t=T-1": ("ndtc", 1.0, 0.0), "ndtc": ("ndtc", 0.4, 0.4)}
    name, mu, sigma = law.get(collector, (collector, 0.4, 0.4))
    return ptq4dm.CalibrationConfig(name, args.calibration_samples, args.steps, mu, sigma, batch_size=args.batch_size)


def recipe(row: dict) -> ptq4dm.QuantConfig:
    weight_bits, activation_bits = BITS[row["bits"]]
    bits = dict(weight_bits=weight_bits, activation_bits=activation_bits)
    if row["method"] == "RTN dynamic":
        return ptq4dm.RTNConfig(activations="dynamic", **bits)
    if row["method"] == "RTN":
        return ptq4dm.RTNConfig(**bits)
    return ptq4dm.PTQ4DMConfig(objective=row["objective"], **bits)


class Bench:
    """The model, its held-out truth and its calibration stores, each made once."""

    def __init__(self, args):
        self.args = args
        self.pipe = load_reference(args.model, device=args.device)
        denoiser(self.pipe).to(memory_format=torch.channels_last)
        self.stores: dict[str, ptq4dm.CalibrationStore] = {}
        self.pipe.scheduler.set_timesteps(args.steps)
        config = ptq4dm.CalibrationConfig("solver", args.num_paired)  # spread evenly over the sampling grid
        timesteps = draw_timesteps(config, 1000, self.pipe.scheduler.timesteps.tolist()).tolist()
        self.truth = Paired(self.pipe, args.num_paired, timesteps, args.steps, args.batch_size)

    def store(self, collector: str) -> ptq4dm.CalibrationStore:
        if collector not in self.stores:
            self.stores[collector] = ptq4dm.collect(self.pipe, calibration(collector, self.args))
        return self.stores[collector]

    def measure(self, row: dict) -> dict:
        """The row with its figures."""
        start, truth = time.time(), self.truth
        model, result = truth.exact, dict(row)
        if row["bits"] != "full":
            model = copy.deepcopy(truth.exact)
            store = None if row["method"] == "RTN dynamic" else self.store(row["collector"])
            report = ptq4dm.quantize(model, recipe(row), store)
            result["kernels"] = sorted({layer["kernel"] for layer in report.layers})
            result["simulated"] = row["bits"] != "W8A8"
            result["bytes_ratio"] = stored_bytes(model) / stored_bytes(truth.exact)
            result |= truth.compare(model)
        result["feature_fid"] = (
            truth.feature_fid(model, self.args.num_fid, self.args.steps) if self.args.num_fid else None
        )
        result["seconds"] = round(time.time() - start, 1)
        result["device"] = torch.cuda.get_device_name() if self.args.device.startswith("cuda") else "CPU"
        return result


def markdown(results: list[dict]) -> str:
    lines = [
        "| bits | method | calibrated on | range | PSNR (dB) | eps error | feature-FID |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        bits = r["bits"] + (" (simulated)" if r.get("simulated") else "")
        psnr = f"{r['psnr']:.2f}" if "psnr" in r else ""
        eps = f"{r['eps_error']:.2e}" if "eps_error" in r else ""
        fid = "" if r["feature_fid"] is None else f"{r['feature_fid']:.2f}"
        lines.append(f"| {bits} | {r['method']} | {r['collector']} | {r['objective']} | {psnr} | {eps} | {fid} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--num-fid", type=int, default=10_000, help="images for feature-FID; 0 leaves it out")
    parser.add_argument("--num-paired", type=int, default=256, help="held-out seeds")
    parser.add_argument("--calibration-samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th row from the i-th")
    parser.add_argument("--limit", type=int, help="stop after so many rows")
    parser.add_argument("--output", type=Path, default=Path("out/calibration.json"))
    args = parser.parse_args()
    index, count = (int(part) for part in args.shard.split("/"))
    results = Rows(args.output, {name: getattr(args, name) for name in SETTINGS})
    done = {identity(row) for row in results}
    todo = [row for row in rows()[index::count] if identity(row) not in done][: args.limit]
    bench = Bench(args) if todo else None
    for row in progress_bar(todo, desc=args.model, unit="row"):
        results.add(bench.measure(row))
    order = [identity(row) for row in rows()]
    print(markdown(sorted(results, key=lambda row: order.index(identity(row)))))


if __name__ == "__main__":
    run(main)
