"""What each choice of block training is worth: the ablation table of GradPTQ and PD-Quant.

    python scripts/comparisons/compare_gradptq.py --stage lr --bits W4A8 --output out/gradptq.json
    python scripts/comparisons/compare_gradptq.py --stage factors calibration steps --seeds 0 1 2 --minutes 50
        --device cuda --num-paired 256 --shard 0/4 --output out/gradptq-0.json
    python scripts/comparisons/compare_gradptq.py --stage pdquant --bits W2A4 --base steps=1500 train=rounding+scales

Rows change one choice of a base at a time (trials.py); the base is GradPTQConfig's defaults and --base. Beside them
stand rounding to nearest and Hessian rounding on the same grid of weights: ranges of least squared error, dynamic
inputs. Stage lr first: the rows of other optimizers than the base's take each its best learning rate from stage lr,
in --output or --rates; the base has the one that --base gives it, or its default.

Columns: noise prediction error on tuples of held-out seeds; its ratios, seed by seed; held-out over calibration
error; share of codes off the nearest; with --eval all, PSNR of same-seed images; seconds and memory of quantization.
A seed fixes calibration and training. Rows in the output are not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gradptq_bench import Bench
from gradptq_recipes import APART, base_of, defaults, widths
from gradptq_report import Table
from long_runs import Deadline, shard_of
from trials import STAGES, Trial, all_trials

from ptq4dm.errors import UserError, run
from ptq4dm.files.outside import read_object
from ptq4dm.files.rows import Rows
from ptq4dm.progress import progress_bar

SETTINGS = ("sampling_steps", "num_paired", "calibration_samples", "eval", "base", "law")


def best_rates(rows: list[dict], model: str, bits: str) -> dict[str, float]:
    """optimizer -> the learning rate of least mean error over the seeds of stage lr, of one model and width."""
    errors: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if (row["stage"], row["model"], row["bits"]) == ("lr", model, bits):
            key = row["options"]["optimizer"], row["options"]["learning_rate"]
            errors.setdefault(key, []).append(row["eps_error"])
    ranked = sorted(errors, key=lambda key: sum(errors[key]) / len(errors[key]), reverse=True)
    return dict(ranked)


def fill(results: Rows, rated: list[dict], trials: list[Trial], args, make_bench=Bench) -> tuple[int, dict[str, str]]:
    """Measure what is missing in `results`: (rows not begun for want of time, why rows could not be measured).

    rated: more rows of stage lr.
    """
    index, count = shard_of(args.shard)
    places = [(model, bits, seed) for model in args.model for bits in args.bits for seed in args.seeds]
    done = {(row["model"], row["bits"], row["seed"], row["row"]) for row in results}
    everything = [(*place, trial) for place in places for trial in trials][index::count]
    todo = [item for item in everything if (*item[:3], item[3].name) not in done]
    todo.sort(key=lambda item: (args.model.index(item[0]), item[2], item[3].law or args.law))  # stores are made once
    deadline, bench, failed, left = Deadline(args.minutes), None, {}, 0
    with progress_bar(todo, unit="row") as bar:
        for model, bits, seed, trial in bar:
            bar.set_postfix_str(f"{model} {bits}: {trial.name}, seed {seed}")
            work = 0.0 if trial.rounding else float(trial.options.get("steps", args.steps))
            if deadline.passed(work):
                left += 1
                continue  # a shorter one may fit
            if bench is None or bench.model != model:
                bench = None  # its memory first
                bench = make_bench(model, args)
            rate = best_rates([*results, *rated], model, bits).get(trial.optimizer)
            try:
                results.add(bench.measure(trial, bits, seed, rate))
            except UserError as error:
                failed[f"{model} {bits}: {trial.name}"] = str(error)
                continue
            if work:
                deadline.took(results[-1]["seconds"], work)
    return left, failed


def untuned(rows: list[dict], args) -> list[str]:
    """A line for each model and width whose base has not the best learning rate of its optimizer."""
    lines = []
    for place in dict.fromkeys((row["model"], row["bits"]) for row in rows):
        best = best_rates(rows, *place).get(args.optimizer)
        bases = [row for row in rows if row["row"] == "base" and (row["model"], row["bits"]) == place]
        if best is not None and any(row["learning_rate"] != best for row in bases):
            lines.append(
                f"{' '.join(place)}: {args.optimizer} is best at another rate: --base learning_rate={best:g}"
            )
    return lines


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", nargs="+", default=["factors"], choices=STAGES)
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
    parser.add_argument("--minutes", type=float, help="begin no row that would end after so many")
    parser.add_argument(
        "--shard", default="0/1", help="i/n: every n-th row from the i-th, with an --output of its own"
    )
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
    for bits in args.bits:
        widths(bits)
    shard_of(args.shard)
    for path in (*args.join, *args.rates):
        if not path.is_file():
            raise UserError(f"there is no {path} to read.")


def main(words: list[str] | None = None, make_bench=Bench) -> None:
    args = arguments().parse_args(words)
    check(args)
    args.options = base_of(args.base)
    whole = defaults() | args.options
    args.steps, args.optimizer, args.num_tuples = whole["steps"], whole["optimizer"], whole["num_tuples"]
    table = all_trials(whole, args.law, tuple(args.learning_rates))
    trials = [trial for trial in table if trial.stage in ("", *args.stage)]
    settings = {name: getattr(args, name) for name in SETTINGS}
    results = Rows(args.output, settings)
    joined = [row for path in args.join for row in Rows(path, settings)]
    rated = [row for path in args.rates for row in read_object(path, {"rows": list}, "give another")["rows"]]
    left, failed = fill(results, [*joined, *rated], trials, args, make_bench)
    found = [*results, *joined]
    for model, bits in dict.fromkeys((row["model"], row["bits"]) for row in found):
        own = Table(row for row in found if (row["model"], row["bits"]) == (model, bits))
        for stage in STAGES:
            names = [trial.name for trial in table if trial.stage in ("", stage)]
            if any(row["stage"] == stage for row in found):
                print(
                    f"\n{model} {bits}, stage {stage}, {args.num_paired} held-out tuples\n\n{own.markdown(names)}\n"
                )
    for name, why in failed.items():
        print(f"left out: {name}: {why}")
    for line in untuned([*found, *rated], args):
        print(line)
    if left:
        print(f"{left} rows are still to do; the same command goes on with them.")


if __name__ == "__main__":
    run(main)
