"""Zeroth-order personalization of packed models against back-propagation in float32: a class that has no row.

    python scripts/training/compare_zoodip.py --data cifar10-jpeg.tar.xz --output out/zoodip.jsonl --device cuda
    python scripts/training/compare_zoodip.py --output out/zoodip.jsonl --report

The row of one class of the embedded DiT is forgotten: it starts as the mean of the other classes' rows, in rows
"near" as that of the other class that fits the pictures best, in rows "null" as the row of no class; and is learned
from --images pictures of that class. Measured on pictures that were not learned from, with noise of their own and
timesteps over the whole schedule: the loss, and its drop from the start as a share of the drop that back-propagation
through the float32 model reaches from there with the same pictures; and how many of --samples pictures the embedded
classifier takes for the class. A row of results is a line of JSON, and what is there is not measured again; several
processes may write one file, each its --share.

    MODEL start, MODEL own row             before, and with the row that the model was trained with
    float32 back-propagation SEED          the ceiling: Adam on gradients
    MODEL both | subspace | partial | neither SEED    the paper's two ideas
    MODEL paper's times SEED               both, with the timesteps that the paper has for latents
    MODEL released SEED                    both, the subspace as the authors' code has it
    MODEL equal SEED                       both, and each image of a step counts alike
    MODEL walk SEED                        control: steps of "both", of equal length, in random directions
    MODEL shuffled SEED                    control: losses of "both" dealt to other perturbations
    MODEL equal, shuffled SEED             the same of "equal", whose steps do not grow by it
    MODEL both, near SEED | MODEL both, null SEED | ...   all of these from the other starts
    MODEL memory                           peak memory of a step, of sampling, of back-propagation; steps a second
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from dataclasses import asdict
from pathlib import Path

import torch
from cifar10 import CLASSES
from rows_file import RowsFile, read_rows
from zoodip_arms import BACK, KNOWN, MEMORY, OWN, Arm, back_propagated, name_of, rows_of, tuned
from zoodip_bench import Bench, settled
from zoodip_memory import memory
from zoodip_report import report

from ptq4dm.errors import UserError, run
from ptq4dm.pipelines.devices import check_device
from ptq4dm.training.personalization.problem import ready

FREE = ("data", "output", "rows", "share", "device", "report")  # what decides no figure


def measure(bench: Bench, name: str, seed: int) -> dict:
    """The facts of a row: loss, drop from the start, samples of the class."""
    args, arm = bench.args, KNOWN.get(name, Arm())
    problem = bench.problem(name, seed, **arm.settings)
    start, before, begun = problem.target.start, bench.packed_bytes(), time.monotonic()
    if arm.by == BACK:
        u = back_propagated(problem, args.back_steps, args.back_lr)
    elif name in KNOWN:
        u = tuned(problem, arm.by)
    else:
        u = bench.row(bench.label) if name == OWN else start
    settled(bench.device)
    seconds = time.monotonic() - begun
    losses, first = bench.losses(u), bench.losses(start)
    drop = first - losses
    found = {
        "loss": float(losses.mean()),
        "drop": float(drop.mean()),
        "drop_error": float(drop.std() / len(drop) ** 0.5),
        "drop_by_time": [float(part.mean()) for part in drop.tensor_split(min(10, len(drop)))],
        "moved": float((u - start).norm()),
        "seconds": round(seconds, 2),
        "unchanged": bench.packed_bytes() == before,
        "init": problem.target.facts["init"],
    }
    if name in KNOWN and arm.by != BACK:
        found["steps_per_second"] = round(args.steps / seconds, 2)
    return found | ({"accuracy": bench.accuracy(u)} if args.samples else {})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder or .tar.xz with train/<class>/ and test/<class>/")
    parser.add_argument("--output", type=Path, default=Path("out/zoodip.jsonl"))
    parser.add_argument("--rows", nargs="+", default=["*"], help="rows whose names fit one of these patterns")
    parser.add_argument("--share", default="1/1", help="i/n: of the rows every n-th, from the i-th on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of what is not packed; float32")
    parser.add_argument("--class-name", default="ship", choices=CLASSES)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--perturbations", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--back-steps", type=int, default=200)
    parser.add_argument("--back-lr", type=float, default=0.05)
    parser.add_argument("--evaluation", type=int, default=1000, help="held-out rows of the loss")
    parser.add_argument("--samples", type=int, default=256, help="pictures that the classifier looks at; 0: none")
    parser.add_argument("--sampler-steps", type=int, default=25)
    parser.add_argument("--rows-at-once", type=int, default=256)
    parser.add_argument("--timed-seconds", type=float, default=2.0, help="of each speed in the rows of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="print the table of what is there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.report:
        print(report(read_rows(args.output)))
        return
    if args.data is None:
        raise UserError("give --data, a folder or .tar.xz of CIFAR-10 as JPEG files.")
    device = check_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    place, number = (int(part) for part in args.share.split("/"))
    every = rows_of(args.seed, args.seeds)
    wanted = [row for row in every if any(fnmatch.fnmatch(name_of(*row), one) for one in args.rows)]
    rows = RowsFile(args.output, device)
    benches: dict[str, Bench] = {}
    for model, arm, seed in wanted[place - 1 :: number]:
        name = name_of(model, arm, seed)
        if rows.has(row=name, settings=settings):
            continue
        if model not in benches:
            benches = {model: Bench(args, model)}  # one at a time is in memory
        bench = benches[model]
        with ready(bench.pipe):
            facts = memory(bench, model) if arm == MEMORY else measure(bench, arm, seed)
            config = bench.problem(arm, seed, **KNOWN.get(arm, Arm()).settings).config
        rows.add(row=name, model=model, arm=arm, seed=seed, **facts, settings=settings, config=asdict(config))
        if arm == MEMORY:
            benches = {}  # it has let go of the pictures


if __name__ == "__main__":
    run(main)
