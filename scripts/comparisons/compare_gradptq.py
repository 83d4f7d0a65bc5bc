"""What each choice of block training is worth: the ablation table of GradPTQ and PD-Quant.

    python scripts/comparisons/compare_gradptq.py --stage lr --bits W4A8 --output out/gradptq.json
    python scripts/comparisons/compare_gradptq.py --stage factors calibration steps --seeds 0 1 2 --minutes 50
        --device cuda --num-paired 256 --workers 24 --output out/gradptq.json
    python scripts/comparisons/compare_gradptq.py --stage factors --near 0.1 --seeds 1 2 --output out/gradptq.json
    python scripts/comparisons/compare_gradptq.py --stage factors --only base nearest gptq "loss *"
    python scripts/comparisons/compare_gradptq.py --stage pdquant --bits W2A4 --base steps=1500 train=rounding+scales

Rows change one choice of a base at a time (trials.py); the base is GradPTQConfig's defaults and --base. Beside them
stand rounding to nearest and Hessian rounding on the same grid of weights: ranges of least squared error, dynamic
inputs. Stage lr first: the rows of other optimizers, variables and starts than the base's take each its best learning
rate from stage lr, in --output or --rates; the base has the one that --base gives it, or its default.

Columns: noise prediction error on tuples of held-out seeds; its ratios, seed by seed; held-out over calibration
error; share of codes off the nearest; with --eval all, PSNR of same-seed images; seconds and memory of quantization.
A seed fixes calibration and training. Rows in the output are not made again. --workers: processes that share the
rows (workers.py), on all GPUs; their seconds are those of a busy machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from gradptq_bench import Bench
from gradptq_recipes import APART, base_of, best_rates, defaults, tuned, untuned, widths
from gradptq_report import LONGEST, Table
from long_runs import add_options, named, shard_of
from trials import STAGES, Trial, all_trials, beside_all
from workers import Task, check_workers, join_shards, measure_rows

from ptq4dm.errors import UserError, run
from ptq4dm.files.outside import read_object
from ptq4dm.files.rows import Rows

SETTINGS = ("sampling_steps", "num_paired", "calibration_samples", "eval", "base", "law")


def tasks(results: list[dict], trials: list[Trial], args) -> list[Task]:
    """What is to do, in order: what takes long, then stage by stage, at last what takes its rate from stage lr.

    results: all rows that are there, those of other shards, too.
    """
    index, count = shard_of(args.shard)
    places = [(model, bits, seed) for model in args.model for bits in args.bits for seed in args.seeds]
    done = {(row["model"], row["bits"], row["seed"], row["row"]) for row in results}
    everything = [(*place, trial) for place in places for trial in trials][index::count]
    todo = [item for item in everything if (*item[:3], item[3].name) not in done]
    if args.near is not None:
        near = {place: table_of(results, *place).near(args.near) for place in {item[:2] for item in todo}}
        beside = {trial.name for trial in beside_all()}
        todo = [item for item in todo if item[3].name in near[item[:2]] | beside]

    def order(item) -> tuple:
        model, _, _, trial = item
        waits = trial.tuned and "lr" in args.stage
        slow = trial.name == LONGEST, kind(trial, args) not in ("rounding", "training")
        return args.model.index(model), [not one for one in slow], waits, ["", *args.stage].index(trial.stage)

    return [
        Task(model, f"{bits}, {trial.name}, seed {seed}", (trial, bits, seed), kind(trial, args), work(trial, args))
        for model, bits, seed, trial in sorted(todo, key=order)
    ]


def table_of(rows: Iterable[dict], model: str, bits: str) -> Table:
    return Table(row for row in rows if (row["model"], row["bits"]) == (model, bits))


def kind(trial: Trial, args) -> str:
    """Rows of one kind take about as long: "rounding", "training", and what is slower for the same steps."""
    options = args.whole | trial.options
    if trial.rounding:
        return "rounding"
    if options["prediction"] or options["unit"] == "layer":
        return "prediction" if options["prediction"] else "layers"
    return "training"


def work(trial: Trial, args) -> float:
    """How long a row takes, in rows of the base; none counts less, for part of a row has nothing to do with steps."""
    return max(1.0, trial.options.get("steps", args.whole["steps"]) / args.whole["steps"])


def measure(bench, key: tuple[Trial, str, int], known) -> dict:
    """The row of a task; known: all rows that are there."""
    trial, bits, seed = key
    rate, args = None, bench.args
    if trial.tuned:
        rows = [*known, *args.rated]
        rate = best_rates(rows, bench.model, bits).get(tuned(args.whole | trial.options))
    return bench.measure(trial, bits, seed, rate)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", nargs="+", default=["factors"], choices=STAGES, help="in their order")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names or patterns of rows")
    parser.add_argument(
        "--near",
        type=float,
        metavar="SHARE",
        help="rows with an error so far of at most 1 + SHARE times the base's",
    )
    parser.add_argument("--model", nargs="+", default=["dit-cifar10"], help="embedded models")
    parser.add_argument("--bits", nargs="+", default=["W4A8"], help="widths, such as W4A8 W3A8 W2A4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibration and training")
    parser.add_argument("--base", nargs="+", default=[], metavar="NAME=VALUE", help="options of the base")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[], help="of stage lr, beside its own")
    parser.add_argument(
        "--law", default="solver", choices=("uniform", "ndtc", "solver"), help="the base's calibration"
    )
    parser.add_argument("--eval", default="eps", choices=("eps", "all"), help="all: PSNR of images, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sampling-steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--num-paired", type=int, default=256, help="held-out seeds")
    parser.add_argument("--calibration-samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64, help="of sampling and of predictions")
    add_options(parser)
    parser.add_argument("--join", nargs="+", type=Path, default=[], help="outputs of other shards")
    parser.add_argument("--rates", nargs="+", type=Path, default=[], help="outputs of stage lr, of any base")
    parser.add_argument("--output", type=Path, default=Path("out/gradptq.json"))
    return parser


def check(args) -> None:
    """Raises UserError, before any work, for what cannot be measured."""
    for name in ("sampling_steps", "num_paired", "calibration_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}.")
    if args.calibration_samples > APART or min(args.seeds) < 0 or max(args.seeds) > 8:
        raise UserError(
            f"--seeds are from 0 to 8, and --calibration-samples at most {APART}: others meet held-out seeds."
        )
    if args.near is not None and args.near < 0:
        raise UserError(f"--near is a share such as 0.1, not {args.near}.")
    for bits in args.bits:
        widths(bits)
    shard_of(args.shard)
    check_workers(args)
    for path in (*args.join, *args.rates):
        if not path.is_file():
            raise UserError(f"there is no {path} to read.")


def main(words: list[str] | None = None, make_bench=Bench) -> None:
    args = arguments().parse_args(words)
    check(args)
    args.options = base_of(args.base)
    args.whole = defaults() | args.options
    table = all_trials(args.whole, args.law, tuple(args.learning_rates))
    trials = named([trial for trial in table if trial.stage in ("", *args.stage)], args.only)
    settings = {name: getattr(args, name) for name in SETTINGS}
    results = Rows(args.output, settings)
    join_shards(results)
    joined = [row for path in args.join for row in Rows(path, settings)]
    outside = [row for path in args.rates for row in read_object(path, {"rows": list}, "give another")["rows"]]
    args.rated = [row for row in [*joined, *outside] if row["stage"] == "lr"]
    left, failed = measure_rows(tasks([*results, *joined], trials, args), results, measure, args, make_bench)
    found = [*results, *joined]
    for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in found):
        own = table_of(found, model, bits)
        for stage in STAGES:
            names = [trial.name for trial in table if trial.stage in ("", stage)]
            if any(row["stage"] == stage for row in found) or not any(row["stage"] for row in found):
                print(
                    f"\n{model} {bits}, stage {stage}, {args.num_paired} held-out tuples\n\n{own.markdown(names)}\n"
                )
    for name, why in failed.items():
        print(f"left out: {name}: {why}")
    for line in untuned(found, args.rated, args.whole, table):
        print(line)
    if left:
        print(f"{left} rows are still to do; the same command goes on with them.")


if __name__ == "__main__":
    run(main)
