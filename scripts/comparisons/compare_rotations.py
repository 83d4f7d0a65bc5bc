"""Errors of layers under rotated inputs and branches of inputs: the output of each, in dB, on rows that it never saw.

    python scripts/comparisons/compare_rotations.py [--model dit-cifar10 dit-cifar10-outliers] [--layers 6]
        [--rounding nearest] [--output out/rotations.json]

The layers are SVDQuant's groups, layers that share an input; of them so many, evenly from all. What a layer is fed on
calibration calls is halved: one half decides (smoothing, branch, rounding), the other is judged. "hadamard" gives the
group of a regular rotation; "inputs" is a branch of the directions in which inputs are largest, "dealt" one of
directions dealt at random, its control; "smooth" divides with alpha = beta = 1/2. Rows in the output are not made
again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from conditions import calibration_folder, made_on
from planted import pipeline
from torch import Tensor

import ptq4dm
from ptq4dm.calibration.evidence import Evidence, calibration_batches
from ptq4dm.errors import run
from ptq4dm.files.rows import Rows
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.quantization.planning import make_plan
from ptq4dm.reconstruction.layer_errors import Ratio
from ptq4dm.svdquant.group import Group, output, refine, round_rest
from ptq4dm.svdquant.layers.plan import SVDQPlan

RANK = 32
VARIANTS: dict[str, dict] = {
    "nearest": {"rank": 0},
    "hadamard 16": {"rank": 0, "rotation": 16},
    "hadamard 64": {"rank": 0, "rotation": 64},
    "hadamard 256": {"rank": 0, "rotation": 256},
    "branch": {},
    "branch, hadamard 64": {"rotation": 64},
    "branch, smooth": {"alpha": 0.5, "beta": 0.5},
    "branch, smooth, hadamard 64": {"alpha": 0.5, "beta": 0.5, "rotation": 64},
    "inputs": {"subspace": "inputs"},
    "inputs, hadamard 64": {"subspace": "inputs", "rotation": 64},
    "inputs, smooth": {"subspace": "inputs", "alpha": 0.5, "beta": 0.5},
    "dealt, hadamard 64": {"subspace": "inputs", "rotation": 64},
}


@torch.no_grad()
def decibel(weight: Tensor, rows: Tensor, choice: SVDQPlan, dealt: bool) -> float:
    """The ratio of output to error of a layer [N, K], decided on one half of rows [R, K] and judged on the other."""
    decides, judged = rows[::2], rows[1::2]
    group = Group.of(weight, decides, decides.abs().amax(0), choice, torch.bfloat16)
    if dealt:
        draw = torch.randn(weight.shape[1], choice.rank, generator=torch.Generator().manual_seed(0))
        group.subspace = torch.linalg.qr(draw.to(weight))[0].T.contiguous()
        group.peak = group.rest_of(group.rows).abs().amax(0)
    smooth = group.divisors(choice.alpha, choice.beta)
    split = round_rest(group, refine(group, smooth))
    return Ratio.between(judged @ weight.T, output(group, split, choice.turned(judged))).decibel


def layer_rows(model: str, args, done: set) -> None:
    """Measure the layers of a model that are not there yet."""
    pipe = pipeline(model, args.device)
    config = ptq4dm.CalibrationConfig("solver", args.calibration_samples, args.steps, batch_size=8)
    store = ptq4dm.collect(pipe, config, calibration_folder(args, model, "solver", config))
    network = denoiser(pipe)
    plan = make_plan(network, ptq4dm.SVDQuantConfig(), store)
    chosen = [n for n, one in plan.layers.items() if isinstance(one, SVDQPlan) and one.activation != "none"]
    leaders = [name for name in chosen if not plan.layers[name].lender]
    places = torch.linspace(0, len(leaders) - 1, min(args.layers, len(leaders))).round().long().unique().tolist()
    leaders = [leaders[place] for place in places if (model, leaders[place]) not in done]
    evidence = Evidence(network, leaders, [], calibration_batches(store.recorded(), args.calibration_samples))
    for leader in leaders:
        together = [name for name in chosen if name == leader or plan.layers[name].lender == leader]
        weight = torch.cat([network.get_submodule(name).weight.detach().flatten(1).float() for name in together])
        rows, found = evidence.of(leader).rows, {}
        for bits, activation in (("A4", "int4"), ("A8", "int8")):
            for name, options in VARIANTS.items():
                if weight.shape[1] % options.get("rotation", 1):
                    continue
                plain = SVDQPlan(rank=RANK, activation=activation, alpha=0.0, beta=0.0, rounding=args.rounding)
                found[f"W4{bits} {name}"] = decibel(weight, rows, replace(plain, **options), "dealt" in name)
        args.results.add({"model": model, "layer": leader, "decibel": found, **made_on(args.device)})
        print(model, leader, {name: round(value, 2) for name, value in found.items()}, flush=True)


def table(rows: list[dict]) -> str:
    """The mean over layers, for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for name in dict.fromkeys(name for row in rows for name in row["decibel"]):
        cells = []
        for model in models:
            values = [row["decibel"][name] for row in rows if row["model"] == model and name in row["decibel"]]
            cells.append(f"{sum(values) / len(values):.2f}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["dit-cifar10", "dit-cifar10-outliers"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--calibration-samples", type=int, default=32)
    parser.add_argument("--stores", type=Path, help="folder of calibration stores; left out, one beside the output")
    parser.add_argument("--output", type=Path, default=Path("out/rotations.json"))
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("rounding", "steps", "calibration_samples")}
    args.results = Rows(args.output, settings)
    for model in args.model:
        layer_rows(model, args, {(row["model"], row["layer"]) for row in args.results})
    print(f"\n{table(args.results)}\n\nmean decibel of {args.layers} layers a model, of outputs on held-out rows")


if __name__ == "__main__":
    run(main)
