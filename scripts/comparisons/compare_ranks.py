"""Whether it pays that each layer's low-rank branch has a rank of its own, chosen by errors at all times or at some.

    python scripts/comparisons/compare_ranks.py --model dit-cifar10 --activations int4 --output out/ranks.json

SVDQuant, every group of layers that share an input in each rank of RANKS. What a group alone adds to the error of the
predicted noise is measured for each rank, on calibration calls of the noisy half of the times and of the clean half.
Ranks are then chosen for the least sum of errors in the bytes of rank 32 in all groups: the group whose next rank
takes most error off for its bytes comes first.

    one                 rank 32 in all groups
    all times           errors of both halves
    noisy, clean        errors of one half alone: do the halves want other ranks?
    all times, dealt    those ranks dealt out at random to groups of the same shape: the control

    eps_error      of held-out noise predictions
    psnr           of same-seed images, with its 95 % interval; without images (--no-images) it is not measured

Rows in the output are not made again.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from conditions import calibration_folder
from controls import generator
from paired import Paired, held_out
from torch import nn

import ptq4dm
from ptq4dm.budgets.candidates import Candidate, packed, planned
from ptq4dm.budgets.masking import Prediction
from ptq4dm.calibration.calls import Calls
from ptq4dm.calibration.evidence import chosen_calls, substituted
from ptq4dm.errors import run
from ptq4dm.files.rows import Rows
from ptq4dm.layers.sizes import bytes_in_16_bits
from ptq4dm.progress import progress_bar

RANKS = (8, 16, 32, 64, 96)
USUAL = 32
KINDS = ("one", "all times", "noisy", "clean", "all times, dealt")
SETTINGS = (
    "model",
    "activations",
    "steps",
    "num_paired",
    "no_images",
    "calibration_samples",
    "tuples",
    "seed",
    "device",
)

Groups = dict[str, list[str]]
Sums = dict[str, dict[int, float]]
"""group -> rank -> a sum over its layers, or of errors."""


def groups_of(candidate: Candidate) -> Groups:
    """First layer -> all that share its input, of those with a branch."""
    found: Groups = defaultdict(list)
    for name, plan in candidate.plans.items():
        if getattr(plan, "rank", 0):
            found[plan.lender or name].append(name)
    return dict(found)


def halves(calls: Calls, count: int) -> dict[str, Calls]:
    """So many calls of the noisy half of the times, and of the clean one, each half evenly."""
    noisy = calls.time >= 0.5
    return {
        name: chosen_calls(calls[torch.where(part)[0]], count) for name, part in (("noisy", noisy), ("clean", ~noisy))
    }


def errors_of(
    model: nn.Module, made: dict[int, Candidate], groups: Groups, parts: dict[str, Calls]
) -> dict[str, Sums]:
    """Half -> what each group alone, in each rank, adds to the error of the prediction, as a share of its signal."""
    predictions = {half: Prediction(model, [list(calls.batches(16))]) for half, calls in parts.items()}
    found: dict[str, Sums] = {half: defaultdict(dict) for half in parts}
    for leader, names in progress_bar(groups.items(), desc="one group at a time", unit="group"):
        for rank, candidate in made.items():
            with substituted(model, {name: candidate.layers[name] for name in names}):
                for half, prediction in predictions.items():
                    found[half][leader][rank] = prediction.error(0)
    return found


def chosen(errors: Sums, sizes: Sums, budget: float) -> dict[str, int]:
    """Group -> rank: from the least on, the step that takes most error off for its bytes, while there are bytes."""
    picks = {leader: RANKS[0] for leader in errors}
    left = budget - sum(sizes[leader][rank] for leader, rank in picks.items())
    while True:
        steps = [
            (
                (errors[leader][rank] - errors[leader][more]) / (sizes[leader][more] - sizes[leader][rank]),
                leader,
                more,
            )
            for leader, rank in picks.items()
            for more in RANKS
            if more > rank and sizes[leader][more] - sizes[leader][rank] <= left
        ]
        gain, leader, more = max(steps, default=(0.0, "", 0))
        if gain <= 0:
            return picks
        left -= sizes[leader][more] - sizes[leader][picks[leader]]
        picks[leader] = more


def dealt(picks: dict[str, int], sizes: Sums, seed: int) -> dict[str, int]:
    """The same ranks in the same bytes, at random to groups whose bytes are the same in every rank."""
    alike: dict[tuple, list[str]] = defaultdict(list)
    for leader in picks:
        alike[tuple(sizes[leader].values())].append(leader)
    found = dict(picks)
    for place, leaders in enumerate(alike.values()):
        order = torch.randperm(len(leaders), generator=generator(seed, place)).tolist()
        found |= {leader: picks[leaders[i]] for leader, i in zip(leaders, order, strict=True)}
    return found


def model_of(exact: nn.Module, made: dict[int, Candidate], groups: Groups, picks: dict[str, int]) -> nn.Module:
    """The quantized model with these ranks; layers without a branch are the same in all candidates."""
    layers = dict(made[USUAL].layers)
    layers |= {name: made[picks[leader]].layers[name] for leader, names in groups.items() for name in names}
    with substituted(exact, layers):
        return copy.deepcopy(exact)


def measured(truth: Paired, model: nn.Module, pictured: bool) -> dict:
    figures = truth.compare(model) if pictured else truth.predicted(model)
    return {
        name: figures[name] for name in ("eps_error", "eps_error_bins", "psnr", "psnr_interval") if name in figures
    }


@torch.no_grad()
def main() -> None:
    args = parsed()
    rows = Rows(args.output, {name: getattr(args, name) for name in SETTINGS}, {"kind": str})
    pipe = ptq4dm.load_reference(args.model, device=args.device)
    config = ptq4dm.CalibrationConfig("solver", args.calibration_samples, args.steps, seed=args.seed)
    store = ptq4dm.collect(pipe, config, calibration_folder(args, args.model, "solver", config))
    truth = held_out(pipe, args.num_paired, args.steps, args.batch_size)
    exact = truth.exact
    recipe = ptq4dm.SVDQuantConfig(activations=args.activations, seed=args.seed)
    plans = planned(exact, {str(rank): replace(recipe, rank=rank) for rank in RANKS}, store)
    made = {int(one.label): one for one in packed(exact, plans, store)}
    groups = groups_of(made[USUAL])
    sizes: Sums = {
        leader: {rank: sum(bytes_in_16_bits(one.layers[name]) for name in names) for rank, one in made.items()}
        for leader, names in groups.items()
    }
    parts = halves(store.recorded(), args.tuples)
    errors = errors_of(exact, made, groups, parts)
    both: Sums = {g: {r: errors["noisy"][g][r] + errors["clean"][g][r] for r in RANKS} for g in groups}
    budget = sum(size[USUAL] for size in sizes.values())
    picks = {"one": dict.fromkeys(groups, USUAL), "all times": chosen(both, sizes, budget)}
    picks |= {half: chosen(errors[half], sizes, budget) for half in ("noisy", "clean")}
    picks["all times, dealt"] = dealt(picks["all times"], sizes, args.seed)
    done = {row["kind"] for row in rows}
    for kind in (kind for kind in KINDS if kind not in done):
        share = sum(sizes[leader][rank] for leader, rank in picks[kind].items()) / budget
        foretold = sum(both[leader][rank] for leader, rank in picks[kind].items()) / 2
        figures = measured(truth, model_of(exact, made, groups, picks[kind]), not args.no_images)
        rows.add({"kind": kind, "bytes": share, "foretold": foretold, "ranks": picks[kind], **figures})
        print(table_of(rows[-1:]).splitlines()[-1], flush=True)
    print(table_of(rows))


def table_of(rows: list[dict]) -> str:
    """A Markdown table, a line a row; bytes of layers with a branch, of those in rank 32."""
    lines = ["| ranks | bytes | error foretold | epsilon error | PSNR dB |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row.get("psnr_interval", (0, 0))
        psnr = f"{row['psnr']:.2f} ({low:.2f} to {high:.2f})" if "psnr" in row else "not measured"
        cells = [row["kind"], f"{row['bytes']:.3f}", f"{row['foretold']:.2e}", f"{row['eps_error']:.2e}", psnr]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10", help="an embedded model")
    parser.add_argument("--activations", default="int4", choices=("int8", "int4", "fp8"))
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--num-paired", type=int, default=64, help="held-out seeds")
    parser.add_argument("--no-images", action="store_true", help="epsilon errors alone")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--tuples", type=int, default=16, help="calls of each half of the times that choose")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration and of what is dealt")
    parser.add_argument("--stores", type=Path, help="folder of calibrations; beside --output")
    parser.add_argument("--output", type=Path, default=Path("out/ranks.json"))
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
