"""OHQ held against what it claims: predicted step times, sensitivities by masks, and the choice between them.

    python scripts/benchmarks/compare_ohq.py --model unet-cifar10 --threads 2 --output out/ohq-unet.json
    python scripts/benchmarks/compare_ohq.py --model dit-cifar10 --threads 1 --thread-time --output out/ohq-dit.json

1. Sensitivities of every layer and format: by masks (weights and outputs, calibration inputs and noise) and by weight
   error alone, each against the direct way, by Spearman's rank correlation over layers; and the runs that they take.
2. At a budget of bytes midway between 8 bits and 4 in all layers: the exact choice, greedy, random choices that use
   the budget up, the exact choice from permuted sensitivities and without full precision, and uniform ones that keep
   in full precision what the exact one does; the error of each, measured on tuples of other
   seeds, beside the line between the two uniform ones.
3. Predicted against measured step times of random mixtures, which nothing was fitted to.

--thread-time counts the seconds that the thread computed, not those of the wall: on a machine with other work, with
one thread. Formats and plans take turns in all timings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

import ptq4dm
from ptq4dm.budgets.candidates import packed, recipes_of
from ptq4dm.budgets.clocks import Figure, time_in_place
from ptq4dm.budgets.costs import costs
from ptq4dm.budgets.exact import allocate
from ptq4dm.budgets.graphs import time_in_graphs
from ptq4dm.budgets.masking import Sensitivity, direct, masked, parts_of
from ptq4dm.budgets.measure import noised, table_of, timed_call_of
from ptq4dm.budgets.references import dealt_out, greedy, random_choices
from ptq4dm.budgets.table import KEEP
from ptq4dm.calibration.evidence import BATCH, squared_error, substituted
from ptq4dm.calibration.record import answers, samples_of
from ptq4dm.errors import run
from ptq4dm.files.atomic import replacing
from ptq4dm.layers.view import find_layers
from ptq4dm.methods.ohq import CANDIDATES
from ptq4dm.pipelines.denoiser import denoiser, evaluation_mode

CONFIDENCE = (0.025, 0.975)
WAYS = ["masked, weights", "masked, outputs", "direct", "masked, weights, noise", "masked, outputs, noise"]


class HeldOut:
    """A model in full precision on calls of other seeds: the error of picks, tuple by tuple."""

    def __init__(self, model, candidates, table, calls):
        self.model, self.table, self.batches = model, table, list(calls.batches(BATCH))
        self.layers = [{}, *(one.layers for one in candidates)]
        self.exact = [self._run(batch) for batch in self.batches]
        self.known: dict[tuple, np.ndarray] = {}

    def quantized(self, picks) -> dict:
        """The layers of some picks."""
        rows = zip(self.table.layers, map(int, picks), strict=True)
        return {name: self.layers[pick][name] for name, pick in rows if name in self.layers[pick]}

    def errors(self, picks) -> np.ndarray:
        """[tuples, 2]: squared difference and squared reference of each."""
        key = tuple(map(int, picks))
        if key not in self.known:
            with substituted(self.model, self.quantized(picks)):
                found = [self._run(batch) for batch in self.batches]
            pairs = [pair for a, b in zip(found, self.exact, strict=True) for pair in zip(a, b, strict=True)]
            self.known[key] = np.array(
                [(squared_error(a, b), squared_error(b, torch.zeros_like(b))) for a, b in pairs]
            )
        return self.known[key]

    def error(self, picks) -> float:
        wrong, right = self.errors(picks).sum(0)
        return float(wrong / right)

    def interval(self, picks, other=None, draws: int = 2000) -> list[float]:
        """95 % interval over tuples of the error, or of its ratio to that of other picks on the same tuples."""
        draw = np.random.default_rng(0)
        ours = self.errors(picks)
        rows = draw.integers(len(ours), size=(draws, len(ours)))
        values = ours[rows].sum(1)
        share = values[:, 0] / values[:, 1]
        if other is not None:
            theirs = self.errors(other)[rows].sum(1)
            share = share / (theirs[:, 0] / theirs[:, 1])
        return [float(v) for v in np.quantile(share, CONFIDENCE)]

    @torch.no_grad()
    def _run(self, batch):
        with evaluation_mode(self.model):
            return samples_of(answers(self.model, batch)[0], batch)


def collected(pipe, args, seed: int):
    config = ptq4dm.CalibrationConfig("uniform", args.tuples, args.steps, batch_size=BATCH, seed=seed)
    return ptq4dm.collect(pipe, config)


def correlations(found: dict, exact: dict, labels: list[str]) -> dict[str, float]:
    """Label -> Spearman's correlation over layers; "mean" of them."""
    names = [name for name in exact if any(exact[name].values())]
    values = {
        label: float(spearmanr([found[n][label] for n in names], [exact[n][label] for n in names]).statistic)
        for label in labels
    }
    return {**values, "mean": float(np.mean(list(values.values())))}


def ways(model, candidates, names, calls, args) -> dict[str, Callable[[], Sensitivity]]:
    """Name of a way -> what makes its sensitivities, on the same tuples."""
    formats, parts = {one.label: one.layers for one in candidates}, parts_of(calls, args.tuples, args.draws)
    noise = parts_of(noised(calls, 0), args.tuples, args.draws)
    return {
        "masked, weights": lambda: masked(model, formats, names, parts, args.share),
        "masked, outputs": lambda: masked(model, formats, names, parts, args.share, "outputs"),
        "direct": lambda: direct(model, formats, names, parts),
        "masked, weights, noise": lambda: masked(model, formats, names, noise, args.share),
        "masked, outputs, noise": lambda: masked(model, formats, names, noise, args.share, "outputs"),
    }


def weight_errors(model, candidates, names) -> dict[str, dict[str, float]]:
    """Layer -> label -> |W - Q|^2: what weights alone tell."""
    return {
        name: {
            one.label: squared_error(model.get_submodule(name).weight, one.layers[name].dequantized_weight())
            for one in candidates
        }
        for name in names
    }


def at_a_budget(truth: HeldOut, table, wide: str, narrow: str, args) -> dict:
    """The choices at the bytes midway between two uniform formats, and the errors of all, measured."""
    ends = [table.uniform(label) for label in (wide, narrow)]
    sizes = [table.size(picks) for picks in ends]
    budget = sum(sizes) / 2
    chosen = allocate(table, None, budget).picks
    quick = greedy(table, None, budget)
    drawn = random_choices(table, args.random, 0, None, budget)
    shuffled = [allocate(dealt_out(table, seed), None, budget).picks for seed in range(args.permuted)]
    measured = sorted(truth.error(picks) for picks in drawn)
    wrong = [truth.error(picks) for picks in ends]
    kept, low = (with_kept(table, picks, chosen) for picks in ends)
    no_keep = allocate(without_kept(table), None, budget).picks
    facts = {
        "layers kept": int((chosen == 0).sum()),
        "kept": {
            "between": between(truth, table, kept, low, budget), "bytes": [table.size(kept), table.size(low)],
            "error": [truth.error(kept), truth.error(low)],
        },
        "none kept": {"error": truth.error(no_keep), "bytes": table.size(no_keep)},
        "bytes": {"budget": budget, wide: sizes[0], narrow: sizes[1], "chosen": table.size(chosen)},
        "error": {wide: wrong[0], narrow: wrong[1], "interpolated": sum(wrong) / 2, "chosen": truth.error(chosen)},
        "predicted": {"chosen": table.error(chosen), wide: table.error(ends[0]), narrow: table.error(ends[1])},
        "interval": truth.interval(chosen),
        "random": {"count": len(drawn), "least": measured[0], "median": measured[len(measured) // 2]},
        "permuted": sorted(truth.error(picks) for picks in shuffled),
        "formats": {label: int((chosen == number).sum()) for number, label in enumerate(table.labels)},
    }  # fmt: skip
    if quick is not None:
        facts["greedy"] = {
            "error": truth.error(quick), "predicted": table.error(quick),
            "chosen_over_greedy": truth.interval(chosen, quick),
        }  # fmt: skip
    return facts


def with_kept(table, picks, chosen):
    """Uniform picks, but full precision where a choice keeps it: what keeping these layers is worth by itself."""
    return np.where(chosen == 0, 0, picks)


def without_kept(table):
    """The table without full precision for layers that can have a format."""
    allowed = table.allowed.copy()
    allowed[:, 0] = ~allowed[:, 1:].any(1)
    return replace(table, allowed=allowed)


def between(truth: HeldOut, table, wide, narrow, budget: float) -> float:
    """The error on the line between two picks at the bytes of a budget; beyond them on the same line, not below 0."""
    share = (budget - table.size(narrow)) / (table.size(wide) - table.size(narrow))
    return max(truth.error(narrow) + share * (truth.error(wide) - truth.error(narrow)), 0.0)


def step_times(truth: HeldOut, table, call, args, clock) -> list[dict]:
    """Predicted and measured times of random mixtures, of which each has formats in shares that are drawn.

    Beside them one format in all layers again: where that takes another share than in the table, it is the machine
    that has changed.
    """
    draw, plans, layers = np.random.default_rng(1), {}, np.arange(len(table.layers))
    for number in range(args.plans):
        shares = draw.dirichlet(np.ones(len(table.labels)))
        picks = draw.choice(len(table.labels), size=len(layers), p=shares)
        plans[str(number)] = np.where(table.allowed[layers, picks], picks, table.stands[layers, picks])
    plans |= {label: table.uniform(label) for label in table.labels[1:]}
    formats = {KEEP: {}, **{name: truth.quantized(picks) for name, picks in plans.items()}}
    if next(truth.model.parameters()).is_cuda:
        steps = time_in_graphs(truth.model, call, formats, {}, {}, args.rounds)[1]
    else:
        times = time_in_place(truth.model, call, formats, [], args.rounds, clock)
        steps = {name: Figure.of(seconds) for name, seconds in times.steps.items()}
    whole = steps[KEEP]
    rows = []
    for name, picks in plans.items():
        figure = steps[name]
        rows.append({
            "plan": name, "predicted": table.latency(picks), "measured": figure.median / whole.median,
            "ratio": table.latency(picks) / (figure.median / whole.median), "quartiles": [figure.low, figure.high],
            "microseconds": figure.median,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unet-cifar10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--thread-time", action="store_true", help="seconds that the one thread computed")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--tuples", type=int, default=32)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler that tuples are taken from")
    parser.add_argument("--batch", type=int, default=8, help="of the step that is timed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--permuted", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="of finding sensitivities")
    parser.add_argument("--output", type=Path, default=Path("out/ohq.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Bench(args).run()


class Bench:
    """One model, its calls and candidates, and what was found; written after each stage."""

    def __init__(self, args):
        self.args, self.clock = args, time.thread_time if args.thread_time else time.perf_counter
        pipe = ptq4dm.load_pipeline(args.model, "float32" if args.device == "cpu" else "bfloat16", args.device)
        self.model = denoiser(pipe)
        self.store, self.other = collected(pipe, args, 0), collected(pipe, args, 10_000)
        self.views = find_layers(self.model)
        self.candidates, _ = packed(self.model, recipes_of(args.candidates), self.store)
        self.facts: dict = {"model": args.model, "clock": self.clock.__name__, "batch": args.batch}
        self.sensitivity = self.facts["sensitivity"] = {}

    def run(self) -> None:
        args, calls, names = self.args, self.store.recorded(), [view.name for view in self.views]
        call = timed_call_of(self.model, calls, args.batch)
        formats = {KEEP: {}, **{one.label: one.layers for one in self.candidates}}
        times = costs(self.model, call, formats, args.rounds, "", self.clock)
        found: dict[str, Sensitivity] = {}
        truth = None
        for way, make in ways(self.model, self.candidates, names, calls, args).items():
            if way not in args.ways:
                continue
            start = time.perf_counter()
            found[way] = one = make()
            seconds = round(time.perf_counter() - start, 1)
            self.sensitivity[way] = {"forwards": one.forwards, "seconds": seconds}
            table = table_of(self.model, self.views, self.candidates, calls, times, one)
            if truth is None:
                truth = HeldOut(self.model, self.candidates, table, self.other.recorded())
                self.facts |= beside(truth, table)
                self.facts["times"] = step_times(truth, table, call, args, self.clock)
                self.write()
            truth.table = table
            budget = at_a_budget(truth, table, table.labels[1], table.labels[-1], args)
            self.facts.setdefault("budget", {})[way] = budget
            self.write()
        if "direct" in found:
            exact, labels = found["direct"].errors, [one.label for one in self.candidates]
            for way, one in found.items():
                self.sensitivity[way]["spearman"] = correlations(one.errors, exact, labels)
            alone = weight_errors(self.model, self.candidates, names)
            self.sensitivity["weight error alone"] = {"spearman": correlations(alone, exact, labels)}
        self.write()
        print(json.dumps(self.facts, indent=1))

    def write(self) -> None:
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.args.output) as temporary:
            temporary.write_text(json.dumps(self.facts, indent=1) + "\n")


def beside(truth: HeldOut, table) -> dict:
    """Facts on the step, and on one format in all layers."""
    return {
        "device": table.device,
        "step": {"microseconds": table.step, "outside": table.outside, "by_format": table.measured},
        "eight_bits_fastest": table.eight_bits_fastest, "narrow_gain": table.narrow_gain,
        "uniform": {
            label: {
                "latency": table.latency(picks), "bytes": table.size(picks), "predicted": table.error(picks),
                "error": truth.error(picks), "measured_latency": table.measured[label] / table.step,
            }
            for label, picks in ((label, table.uniform(label)) for label in table.labels)
        },
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
