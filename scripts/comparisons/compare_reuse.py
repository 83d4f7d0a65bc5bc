"""Steps that reuse a deep part (`ptq4dm.cached_steps`) against fewer evaluations of the same sampler, and controls.

    python scripts/comparisons/compare_reuse.py --model dit-cifar10 --images 16 --output out/reuse-dit.json  # a CPU
    python scripts/comparisons/compare_reuse.py --model unet-cifar10 --device cuda --optimize --dtype bfloat16 \\
        --images 10000 --batch-size 500 --feature-fid --depths 0 1 --output out/reuse-unet.json

The sampler with --evaluations makes the pictures that all others are compared with, from the same seeds: "psnr" is
the mean over images in dB. Ways: the sampler with fewer evaluations; plans (`ptq4dm.plan_cached_steps`) for numbers
of evaluations that are computed, at each depth and with each history; and controls with the weights of the first
history: as many spread evenly, and drawn at random, of which the median is given. "time" is that of a way in the time
of the full sampler. On a GPU both are timed, over all images. On a CPU it is reckoned from the share that a reused
call takes of a whole one, in seconds of the process, the two timed in turns, the least of each. With --feature-fid
also the feature-FID of each. --model may be a quantized folder. Resumed where it stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from statistics import linear_regression, mean, median
from typing import Any

import numpy as np
import torch

import ptq4dm
from ptq4dm.caching.plan_steps import Measured, StepPlanConfig, measured
from ptq4dm.caching.step_plan import StepPlan, even_steps, plain_plan
from ptq4dm.errors import run
from ptq4dm.evaluation.feature_fid import FeatureFID
from ptq4dm.evaluation.paired import image_errors, psnr
from ptq4dm.files.rows import Rows
from ptq4dm.progress import progress_bar
from ptq4dm.samplers.catalog import make_sampler

SETTINGS = (
    "model",
    "sampler",
    "evaluations",
    "images",
    "batch_size",
    "samples",
    "device",
    "dtype",
    "optimize",
    "feature_fid",
)
ROW: dict = {"way": str, "computed": int, "psnr": (int, float), "time": (int, float), "seconds": (int, float)}
PAIRS = 8
FIRST = 2_000_000  # seed of the images; plans are made from others


class Bench:
    """A pipeline, its full sampler's pictures, and how a way is measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = ptq4dm.load_pipeline(args.model, device=args.device, dtype=args.dtype)
        if args.sampler != "own":
            self.pipe.scheduler = make_sampler(args.sampler, self.pipe.scheduler.config)
        if args.optimize:
            print(ptq4dm.optimize(self.pipe, compiled=False if args.device.startswith("cuda") else None))
        self.fid = FeatureFID(args.device) if args.feature_fid else None
        few = range(FIRST, FIRST + min(args.images, args.batch_size))
        for _ in range(3 if args.optimize else 1):  # what is compiled and captured is then
            ptq4dm.sample(self.pipe, few, num_inference_steps=args.evaluations)
        self.full, self.full_seconds = self.sampled(args.evaluations)
        self.plans: dict[int, Measured] = {}
        self.shares: dict[int, float] = {}

    def sampled(self, evaluations: int, plan: StepPlan | None = None) -> tuple[torch.Tensor, float]:
        """(pictures, seconds)."""
        args, found = self.args, []
        seeds = range(FIRST, FIRST + args.images)
        within = nullcontext() if plan is None else ptq4dm.cached_steps(self.pipe, plan)
        with within:
            if args.optimize and plan is not None:
                for _ in range(2):
                    ptq4dm.sample(self.pipe, seeds[: args.batch_size], num_inference_steps=evaluations)
            start = self.now()
            for k in range(0, args.images, args.batch_size):
                found.append(
                    ptq4dm.sample(self.pipe, seeds[k : k + args.batch_size], num_inference_steps=evaluations)
                )
            seconds = self.now() - start
        return torch.cat(found), seconds

    def now(self) -> float:
        if self.args.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, evaluations: int, plan: StepPlan | None, seconds: float) -> float:
        if self.args.device != "cpu":
            return seconds / self.full_seconds
        computed = evaluations if plan is None else len(plan.computed)
        reused = 0.0 if plan is None else (evaluations - computed) * self.share(plan.depth)
        return (computed + reused) / self.args.evaluations

    def share(self, depth: int) -> float:
        """The time of a reused call in that of a whole one, from the least of times, to which others add nothing."""
        if depth not in self.shares:
            some = range(FIRST, FIRST + min(self.args.images, self.args.batch_size))
            times: dict[int, list[float]] = {2: [], 1: []}  # of two evaluations, and of one with one that reuses
            for _ in range(PAIRS):
                for computed in (range(2), range(1)):
                    with ptq4dm.cached_steps(self.pipe, plain_plan(2, computed, depth)):
                        start = self.now()
                        ptq4dm.sample(self.pipe, some, num_inference_steps=2)
                        times[len(computed)].append(self.now() - start)
            self.shares[depth] = 2 * min(times[1]) / min(times[2]) - 1
        return self.shares[depth]

    def measured(self, depth: int) -> Measured:
        if depth not in self.plans:
            config = StepPlanConfig(
                num_inference_steps=self.args.evaluations, depth=depth, num_samples=self.args.samples,
                batch_size=min(self.args.batch_size, self.args.samples),
            )  # fmt: skip
            self.plans[depth] = measured(self.pipe, config, None, None)
        return self.plans[depth]

    def row(self, way: str, evaluations: int, plan: StepPlan | None = None) -> dict[str, Any]:
        images, seconds = self.sampled(evaluations, plan)
        row = {
            "way": way,
            "evaluations": evaluations,
            "computed": evaluations if plan is None else len(plan.computed),
            "psnr": float(np.mean([psnr(one) for one in image_errors(images, self.full)])),
            "seconds": round(seconds, 2),
            "time": round(self.time(evaluations, plan, seconds), 3),
        }
        if plan is not None:
            row |= {"depth": plan.depth, "steps": list(plan.computed)}
        if self.fid is not None:
            row["feature_fid"] = self.fid(images.split(self.args.batch_size))
        row["device"] = torch.cuda.get_device_name() if self.args.device != "cpu" else "CPU"
        return row


def ways(bench: Callable[[], Bench], args: argparse.Namespace) -> dict[tuple[str, int], Callable[[], dict[str, Any]]]:
    """(name, evaluations computed) -> what makes its row; the bench is made with the first that is."""
    found: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {}
    for n in args.fewer:
        found["fewer evaluations", n] = lambda n=n: bench().row("fewer evaluations", n)
    if args.feature_fid:
        found["full", args.evaluations] = lambda: bench().row("full", args.evaluations)

    def planned(way: str, plan: StepPlan) -> dict[str, Any]:
        return bench().row(way, args.evaluations, plan)

    def drawn(way: str, depth: int, count: int) -> dict[str, Any]:
        rng = np.random.default_rng(count)
        inside = [rng.choice(np.arange(1, args.evaluations), count - 1, replace=False) for _ in range(args.random)]
        plans = [bench().measured(depth).with_steps((0, *sorted(map(int, one))), args.histories[0]) for one in inside]
        rows = [planned(way, plan) for plan in plans]
        names = [name for name in ("psnr", "time", "seconds", "feature_fid") if name in rows[0]]
        middle = {name: median(row[name] for row in rows) for name in names}
        each = {"each": [row["psnr"] for row in rows]}
        if args.feature_fid:
            each["each_fid"] = [row["feature_fid"] for row in rows]
        return {**rows[0], **middle, "steps": [row["steps"] for row in rows], **each}

    def chosen(depth: int, count: int, history: int) -> StepPlan:
        if count == args.evaluations:  # a plan of nothing to reuse is refused; here it is the whole, by the same way
            return bench().measured(depth).with_steps(tuple(range(count)), history)
        return bench().measured(depth).plan(1 - count / args.evaluations, history)

    for depth in args.depths:
        at = f", depth {depth}"
        for count in args.computed:
            for history in args.histories:
                name = f"planned, history {history}{at}"
                found[name, count] = lambda w=name, d=depth, c=count, h=history: planned(w, chosen(d, c, h))
            name = f"evenly{at}"
            found[name, count] = lambda w=name, d=depth, c=count: planned(
                w, bench().measured(d).with_steps(even_steps(args.evaluations, c), args.histories[0])
            )
            if args.random:
                name = f"{args.random} at random{at}"
                found[name, count] = lambda w=name, d=depth, c=count: drawn(w, d, c)
    return found


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    rows = Rows(args.output, {name: getattr(args, name) for name in SETTINGS}, ROW)
    done = {(row["way"], row["computed"]) for row in rows}
    todo = {key: make for key, make in ways(cache(lambda: Bench(args)), args).items() if key not in done}
    for make in progress_bar(list(todo.values())):
        rows.add(make())
    print(table(rows))
    for depth, share in reused_shares(rows).items():
        print(f"a call that reuses, depth {depth}: {share:.2f} of the time of a whole one")


def reused_shares(rows: list[dict]) -> dict[int, float]:
    """Depth -> the time of a call that reuses in that of a whole one, the mean over the plans.

    A whole one is the slope of time over evaluations in the rows without reuse; what they take beside (one start for
    all) is taken off the plans, too.
    """
    plain = [row for row in rows if "depth" not in row]
    if len({row["computed"] for row in plain}) < 2:
        return {}
    one, beside = linear_regression([row["computed"] for row in plain], [row["time"] for row in plain])
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["way"].startswith("planned") and row["computed"] < row["evaluations"]:
            share = ((row["time"] - beside) / one - row["computed"]) / (row["evaluations"] - row["computed"])
            found.setdefault(row["depth"], []).append(share)
    return {depth: mean(shares) for depth, shares in found.items()}


def table(rows: list[dict]) -> str:
    """A Markdown table, by time; "ahead": PSNR less that of evaluations without reuse in the same time."""
    fid = any("feature_fid" in row for row in rows)
    names = ["way", "computed", "time", "PSNR", "ahead", *["feature-FID"] * fid]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in sorted(rows, key=lambda row: row["time"]):
        cells = [row["way"], str(row["computed"]), f"{row['time']:.2f}", f"{row['psnr']:.1f}"]
        gain = ahead(row, rows)
        cells += ["" if gain is None else f"{gain:+.1f}"]
        cells += [f"{row.get('feature_fid', float('nan')):.3f}"] if fid else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ahead(row: dict, rows: list[dict]) -> float | None:
    """PSNR of a row that reuses, less that of fewer evaluations in its time."""
    other = in_the_same_time(row, rows, "psnr")
    return None if other is None else row["psnr"] - other


def in_the_same_time(row: dict, rows: list[dict], name: str) -> float | None:
    """What fewer evaluations have in the time of a row that reuses, on a line between those measured, else None."""
    plain = sorted((one["time"], one[name]) for one in rows if one["way"] == "fewer evaluations")
    if "depth" not in row or not plain or not plain[0][0] <= row["time"] <= plain[-1][0]:
        return None
    return float(np.interp(row["time"], *zip(*plain, strict=True)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dit-cifar10", help="an embedded name or a folder, quantized or not")
    parser.add_argument("--sampler", default="deis", help="own: the pipeline's")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--fewer", nargs="*", type=int, default=[10, 12, 14, 16])
    parser.add_argument("--computed", nargs="*", type=int, default=[8, 10, 12, 15], help="evaluations of a plan")
    parser.add_argument("--histories", nargs="+", type=int, default=[3, 1])
    parser.add_argument("--depths", nargs="+", type=int, default=[0], help="where networks are cut")
    parser.add_argument("--random", type=int, default=3, help="draws of the control")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="trajectories that plans are made from")
    parser.add_argument("--feature-fid", action="store_true")
    parser.add_argument("--optimize", action="store_true", help="of a UNet on a GPU without torch.compile")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/reuse.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
