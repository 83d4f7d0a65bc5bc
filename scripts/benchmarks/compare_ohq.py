"""OHQ held against what it claims: predicted step times, sensitivities by masks, and the choice between them.

    taskset -c 0,1 python scripts/benchmarks/compare_ohq.py --model unet-cifar10 --threads 2 --errors-on cuda
    taskset -c 0,1 python scripts/benchmarks/compare_ohq.py --model dit-cifar10 --threads 2 --errors-on cuda
    python scripts/benchmarks/compare_ohq.py --model unet-cifar10 --device cuda --output out/ohq-unet-gpu.json

1. Sensitivities of every layer and format: by masks (weights and outputs, calibration inputs and noise) and by weight
   error alone, each against the direct way, by Spearman's rank correlation over layers; the runs that they take; and
   how two halves of the tuples agree, which bounds every correlation.
2. At a budget of bytes midway between 8 bits and 4 in all layers: the exact choice, greedy, random choices that use
   the budget up, the exact choice from permuted sensitivities and without full precision, and uniform ones that keep
   in full precision what the exact one does; the error of each, measured on tuples of other seeds, with intervals of
   ratios on the same tuples, beside the line between the two uniform ones. And choices along the fronts of bytes and
   of time.
3. Predicted against measured step times of random mixtures, which nothing was fitted to, and of all those choices.

Steps are timed on --device, errors are measured on --errors-on (float32 where steps are timed on a CPU): all of them
need many runs. Everything found is kept beside the output at once (NAME.kept.json): the same command goes on with
the rest. 256 tuples of each set of seeds on a GPU, 24 where a CPU measures the errors (two threads, 8 minutes).

How many tuples are enough, on the DiT: with 128 the 95 % interval of an error reaches from 0.8 to 1.24 of it, that of
its ratio to greedy's from 0.94 to 0.99, to a random choice's from 0.19 to 0.25; with 8 from 0.34 to 2.2, from 0.84 to
0.95 and from 0.08 to 0.30. Errors differ from time to time; ratios on the same tuples differ less.

--thread-time counts the seconds that the thread computed, not those of the wall: on a machine with other work, with
one thread. Formats and plans take turns in all timings.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from ohq_bench.choices import at_a_budget, fronts, uniform
from ohq_bench.held_out import HeldOut
from ohq_bench.kept import Kept
from ohq_bench.steps import by_themselves, measured_costs, mixtures, read_costs, step_times
from ohq_bench.subject import Subject, name_of, subject_of
from ohq_bench.ways import WAYS, correlations, found_by, weight_errors

from ptq4dm.budgets.costs import device_words
from ptq4dm.budgets.measure import table_of
from ptq4dm.budgets.table import Table
from ptq4dm.errors import UserError, run
from ptq4dm.files.atomic import replacing
from ptq4dm.methods.ohq import CANDIDATES

SETTINGS = (
    "model", "device", "errors_on", "threads", "thread_time", "candidates", "tuples", "error_batch", "draws", "share",
    "steps", "batch", "rounds", "plans", "random", "permuted", "points", "seed",
)  # fmt: skip
TIMED_SAMPLES, TIMED_STEPS = 8, 2  # of a model whose steps alone are measured: calls of the right shapes


def main(words: list[str] | None = None) -> None:
    args = arguments().parse_args(words)
    args.errors_on = args.errors_on or args.device
    on_gpu = torch.device(args.errors_on).type == "cuda"
    args.tuples = args.tuples or (256 if on_gpu else 24)
    args.error_batch = args.error_batch or (64 if on_gpu else 8)
    args.output = args.output or Path(f"out/ohq-{args.model.split('-')[0]}-{torch.device(args.device).type}.json")
    check(args)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # what is called float32 computes in it
    facts = Comparison(args).run()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--device", default="cpu", help="of the steps that are timed")
    parser.add_argument("--errors-on", help="device that errors are measured on; that of the steps otherwise")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--thread-time", action="store_true", help="seconds that the one thread computed")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--tuples", type=int, help="of calibration, and as many of other seeds")
    parser.add_argument("--error-batch", type=int, help="tuples of one run that measures errors")
    parser.add_argument("--draws", type=int, default=4, help="masks of a layer, an even number")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler that tuples are taken from")
    parser.add_argument("--batch", type=int, default=8, help="of the step that is timed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--permuted", type=int, default=5)
    parser.add_argument("--points", type=int, default=4, help="of each front")
    parser.add_argument("--seed", type=int, default=0, help="of tuples, masks and random choices")
    parser.add_argument("--ways", nargs="+", default=["masked, weights", "direct"], choices=WAYS)
    parser.add_argument("--output", type=Path)
    return parser


def check(args) -> None:
    """Raises UserError, before any work, for numbers that nothing can be measured with."""
    least = {"threads": 1, "tuples": 2, "error_batch": 1, "draws": 2, "steps": 1, "batch": 1, "rounds": 1, "plans": 1,
             "random": 1, "permuted": 1, "points": 1, "seed": 0}  # fmt: skip
    for name, low in least.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} must be {low} or more, not {getattr(args, name)}.")
    if args.draws % 2 or args.draws > args.tuples:
        raise UserError("--draws is an even number, for two halves agree or not, and at most --tuples.")
    if not 0 < args.share < 1:
        raise UserError(f"--share is a part of a layer's weights, above 0 and below 1, not {args.share:g}.")
    if args.thread_time and args.threads != 1:
        raise UserError("--thread-time counts what one thread computes: give --threads 1.")


def settings(args) -> dict:
    """The options and the devices: no comparison is half of one card, half of another."""
    on = {"timed_on": device_words(torch.device(args.device)), "measured_on": name_of(torch.device(args.errors_on))}
    return {name: getattr(args, name) for name in SETTINGS} | on


class Comparison:
    """One model and what is found of it, stage by stage; a stage that is kept is not done again."""

    def __init__(self, args):
        self.args, self.clock = args, time.thread_time if args.thread_time else time.perf_counter
        self.kept = Kept(args.output.with_suffix(".kept.json"), settings(args))
        timed_on_cpu = torch.device(args.device).type == "cpu"
        exact = "float32" if timed_on_cpu else "bfloat16"
        self.errors = subject_of(args, args.errors_on, exact, args.tuples, args.steps)
        self.timed: Subject = self.errors
        if torch.device(args.errors_on) != torch.device(args.device):
            self.timed = subject_of(args, args.device, exact, TIMED_SAMPLES, TIMED_STEPS)

    def run(self) -> dict:
        """All facts, as JSON holds them."""
        args, kept, start = self.args, self.kept, time.perf_counter()
        costs = read_costs(kept.once("costs", lambda: measured_costs(self.timed, args, self.clock)))
        found, sensitivity, budgets, plans = {}, {}, {}, {}
        for way in [way for way in WAYS if way in args.ways]:
            found[way], sensitivity[way] = found_by(way, self.errors, args, kept)
            table = table_of(
                self.errors.model, self.errors.views, self.errors.candidates, self.errors.calls, costs, found[way]
            )
            truth = HeldOut(self.errors, table, args.error_batch, kept)
            wide, narrow = table.labels[1], table.labels[-1]
            budget = kept.once(f"budget, {way}", lambda: at_a_budget(truth, table, wide, narrow, args))  # noqa: B023
            plans |= {f"{name}, {way}": picks for name, picks in budget["picks"].items()}
            budgets[way] = {name: value for name, value in budget.items() if name != "picks"}
            if way == next(iter(found)):
                first, beside = table, {"uniform": uniform(truth, table)}
                front = kept.once("fronts", lambda: fronts(truth, table, args.points))  # noqa: B023
                plans |= mixtures(table, args.plans)
                plans |= {f"front of {one['budget']}, {one['of']:.4f}": one["picks"] for one in front}
        if "direct" in found:
            self._correlate(found, sensitivity)
        times = kept.once("times", lambda: step_times(self.timed, first, plans, args, self.clock))
        return {
            **self._conditions(first, costs), "sensitivity": sensitivity, **beside, "times": times, "budget": budgets,
            "fronts": [{name: value for name, value in one.items() if name != "picks"} for one in front],
            **self._causes(first, plans, times), "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip

    def _correlate(self, found: dict, sensitivity: dict) -> None:
        """Put each way's rank correlation with the direct one beside it."""
        exact, labels = found["direct"].errors, [one.label for one in self.errors.candidates]
        for way, one in found.items():
            sensitivity[way]["spearman"] = correlations(one.errors, exact, labels)
        alone = weight_errors(self.errors)
        sensitivity["weight error alone"] = {"spearman": correlations(alone, exact, labels)}

    def _conditions(self, table: Table, costs) -> dict:
        """What was measured where, and facts on the step."""
        args = self.args
        return {
            "model": args.model, "clock": self.clock.__name__, "batch": args.batch, "device": table.device,
            "errors_on": name_of(torch.device(args.errors_on)), "tuples": args.tuples, "seed": args.seed,
            "torch": torch.__version__,
            "step": {"microseconds": table.step, "outside": table.outside, "by_format": table.measured},
            "eight_bits_fastest": table.eight_bits_fastest, "narrow_gain": table.narrow_gain,
        }  # fmt: skip

    def _causes(self, table: Table, plans: dict, times: list[dict]) -> dict:
        """On a GPU, the same plans predicted by layers that were timed by themselves: what timing in place mends."""
        if torch.device(self.args.device).type != "cuda":
            return {}
        make = lambda: by_themselves(self.timed, table, plans, times, self.args)  # noqa: E731
        return {"by_themselves": self.kept.once("by themselves", make)}


if __name__ == "__main__":
    run(main)
