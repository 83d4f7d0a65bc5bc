"""How near the few steps of a fitted schedule come to a teacher's trajectories, beside those of samplers.

    python scripts/comparisons/compare_fitted.py --model dit-cifar10 --device cuda --output out/fitted-dit.json
    python scripts/comparisons/compare_fitted.py --model flow-dit-cifar10 --num 16     # on a CPU

A row is one way to sample and one number of evaluations; "error" is the mean over --num images of the root mean
square difference of the end states from those of the teacher with --right steps, from seeds that nothing was fitted
to. Ways: the samplers that are named; schedules fitted with each history and jitter; and two controls of the same
least squares: on grids drawn at random, of which the median is given, and on the teacher's own grid thinned out
evenly. With --teacher MODEL the trajectories are that model's, as where --model is quantized. Resumed where it
stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import numpy as np

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.files.rows import Rows
from ptq4dm.progress import progress_bar
from ptq4dm.samplers import FitConfig, FittedScheduler, fit
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.fitting.fit import endpoint_error
from ptq4dm.samplers.fitting.teacher import facts_of
from ptq4dm.samplers.fitting.trajectories import record
from ptq4dm.samplers.fitting.weights import fit_weights

OPTIONS: dict = {"conditioning": None, "pipeline_kwargs": None}
FIRST = 2_000_000  # seed of the images that errors are measured on
SETTINGS = ("model", "teacher", "num", "teacher_steps", "right", "device")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    rows = Rows(args.output, {name: getattr(args, name) for name in SETTINGS}, {"way": str, "evaluations": int})
    pipe = ptq4dm.load_pipeline(args.model, device=args.device)
    teacher = ptq4dm.load_pipeline(args.teacher, device=args.device) if args.teacher else pipe
    seeds = range(FIRST, FIRST + args.num)
    right = record(teacher, make_sampler("deis", teacher.scheduler.config), seeds, args.right, OPTIONS, args.num)

    def error(scheduler, evaluations: int) -> float:
        found = record(pipe, scheduler, seeds, evaluations, OPTIONS, args.num)
        return endpoint_error(found.states[-1], right.states[-1])

    def fitted(history: int, jitter: float, evaluations: int) -> float:
        config = settings(args, history, jitter, evaluations)
        return error(fit(pipe, config, teacher=teacher), evaluations)

    ways = {name: lambda n, name=name: error(make_sampler(name, pipe.scheduler.config), n) for name in args.samplers}
    for history in args.histories:
        for jitter in args.jitters:
            name = f"fitted, history {history}, jitter {jitter:g}"
            ways[name] = lambda n, h=history, j=jitter: fitted(h, j, n)
    controls = _Controls(pipe, teacher, args)
    ways |= {"even grid, fitted weights": lambda n: error(controls.even(n), n)}
    ways |= {f"{args.random} random grids, fitted weights": lambda n: median(error(s, n) for s in controls.random(n))}
    done = {(row["way"], row["evaluations"]) for row in rows}
    for n, way in progress_bar([(n, way) for n in args.evaluations for way in ways if (way, n) not in done]):
        rows.add({"way": way, "evaluations": n, "error": ways[way](n)})
    print(table(rows, args.evaluations))


class _Controls:
    """Fitted weights on grids that were not searched for."""

    def __init__(self, pipe, teacher, args) -> None:
        self.pipe, self.args = pipe, args
        scheduler, config = make_sampler("deis", teacher.scheduler.config), settings(args, 3, 1e-2, 1)
        self.seeds = range(config.seed, config.seed + config.num_trajectories)
        self.followed = record(teacher, scheduler, self.seeds, config.teacher_steps, OPTIONS, config.batch_size)
        self.facts = facts_of(teacher.scheduler.config)

    def on(self, grid: list[int]) -> FittedScheduler:
        some = slice(len(self.seeds) // 2)
        table, _ = fit_weights(self.pipe, self.followed, grid, self.seeds, OPTIONS, self.facts, some, 3, 1e-2)
        return FittedScheduler(tables={str(len(grid) - 1): table}, **self.facts)

    def even(self, evaluations: int) -> FittedScheduler:
        return self.on([round(i * self.args.teacher_steps / evaluations) for i in range(evaluations + 1)])

    def random(self, evaluations: int) -> list[FittedScheduler]:
        rng, last = np.random.default_rng(evaluations), self.args.teacher_steps
        inside = [
            sorted(rng.choice(np.arange(1, last), evaluations - 1, replace=False)) for _ in range(self.args.random)
        ]
        return [self.on([0, *map(int, places), last]) for places in inside]


def settings(args, history: int, jitter: float, evaluations: int) -> FitConfig:
    return FitConfig(
        evaluations=[evaluations], num_trajectories=args.num, batch_size=args.num, teacher_steps=args.teacher_steps,
        history=history, jitter=jitter,
    )  # fmt: skip


def table(rows: list[dict], evaluations: list[int]) -> str:
    """A Markdown table: a line a way, a column a number of evaluations."""
    found = {(row["way"], row["evaluations"]): row["error"] for row in rows}
    lines = ["| way | " + " | ".join(map(str, evaluations)) + " |", "|---" * (len(evaluations) + 1) + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = [f"{found[way, n]:.4f}" if (way, n) in found else "" for n in evaluations]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dit-cifar10", help="that samples: an embedded name or a folder")
    parser.add_argument("--teacher", help="model whose trajectories are followed; --model itself")
    parser.add_argument("--samplers", nargs="+", default=["deis", "ipndm"], metavar="NAME")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[4, 5, 6, 8, 10])
    parser.add_argument("--histories", nargs="+", type=int, default=[3])
    parser.add_argument("--jitters", nargs="+", type=float, default=[1e-2])
    parser.add_argument("--random", type=int, default=5, help="grids of the control")
    parser.add_argument("--num", type=int, default=64, help="images that are fitted to, and as many to measure on")
    parser.add_argument("--teacher-steps", type=int, default=60)
    parser.add_argument(
        "--right", type=int, default=200, help="steps of the trajectories that errors are counted from"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/fitted.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
