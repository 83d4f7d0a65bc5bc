"""Samplers on three seeds of 10,000 images, with schedules fitted to the model; and on one seed of W8A8 models.

    python scripts/comparisons/sampler_seeds.py best     # a model in a line: fitted, our best named, diffusers' best
    python scripts/comparisons/sampler_seeds.py seeds    # full precision: each sampler's mean and reach
    python scripts/comparisons/sampler_seeds.py w8a8     # each sampler on the quantized models
    python scripts/comparisons/sampler_seeds.py gains    # what is ahead of what, seed by seed
    python scripts/comparisons/sampler_seeds.py fifty    # 10 evaluations against 50 of DDIM
    python scripts/comparisons/sampler_seeds.py others   # more samplers, one seed

Reads scripts/results/samplers-seeds.jsonl; for 50 evaluations and more samplers samplers-*.json, too. The tables of
the pages are what this prints (a test holds them together).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from ptq4dm.errors import run

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = {
    "unet-cifar10": "UNet",
    "dit-cifar10": "DiT",
    "flow-dit-cifar10": "flow DiT",
    "flow-dit-large-cifar10": "large flow DiT",
}
BUDGETS = (4, 5, 6, 8, 10, 20)
KINDS = ("fitted", "ours", "diffusers")
FOLLOWS = "fitted, follows full precision"
FITTED = {
    (False, "float", "float"): "fitted",
    (True, "W8A8", "float"): FOLLOWS,
    (True, "W8A8", "W8A8"): "fitted, follows itself",
    (True, "float", "float"): "fitted in full precision",
}
"""(quantized, the model that a schedule was fitted to, the one whose trajectories it follows) -> its name here."""

OTHERS = (
    *("t_ab3/log", "t_ab3/edm", "ipndm2/quad", "rho_rk-3heun/edm"),
    *(f"diffusers/{one}" for one in ("ddim", "heun", "deis", "dpm++2m", "dpm++3m-karras")),
)
"""Samplers of the older runs that were not run on three seeds, some of many."""

TEN = ("`deis`, 10", "our best, 10", "fitted, 8", "fitted, 10")
"""What is put beside 50 of DDIM: sampler, evaluations."""

Found = dict[str, dict[int, dict[int, float]]]
"""Sampler -> evaluations -> seed -> feature-FID."""


def rows_of(model: str, quantized: bool = False, folder: Path = RESULTS) -> Found:
    """What was measured of a model: fitted schedules first, then our samplers by name, then diffusers'."""
    found: Found = {}
    for line in (folder / "samplers-seeds.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if (row["model"], row["quantized"]) == (model, quantized):
            name = row["sampler"]
            name = FITTED[quantized, row["fitted_to"], row["follows"]] if name == "fitted" else name
            found.setdefault(name, {}).setdefault(row["budget"], {})[row["seed"]] = row["feature_fid"]
    return {name: found[name] for name in sorted(found, key=lambda name: (KINDS.index(kind_of(name)), name))}


def runs_of(quantized: bool) -> dict[str, tuple[str, Found]]:
    """Model -> (label, what was measured), of the models that rows are of."""
    runs = {model: (label, rows_of(model, quantized)) for model, label in MODELS.items()}
    return {model: run for model, run in runs.items() if run[1]}


def kind_of(sampler: str) -> str:
    """Of KINDS; "ours" are those that --sampler takes by name."""
    return next((kind for kind in ("fitted", "diffusers") if sampler.startswith(kind)), "ours")


def best(found: Found, budget: int, kind: str = "") -> dict[int, float]:
    """The seeds of the sampler with the lowest mean, of a kind or of all; those that lack a seed are passed over."""
    some = [rows[budget] for name, rows in found.items() if budget in rows and kind in ("", kind_of(name))]
    most = max(map(len, some), default=0)
    return min((seeds for seeds in some if len(seeds) == most), key=lambda seeds: mean(seeds.values()), default={})


def most_seeds(found: Found, budget: int) -> int:
    """Of how many seeds a sampler was run at most, with so many evaluations."""
    return max((len(rows[budget]) for rows in found.values() if budget in rows), default=0)


def best_means(found: Found, budget: int) -> dict[str, float]:
    """The mean of each kind's best, over the seeds that all kinds have: a seed moves all samplers alike."""
    ones = {kind: one for kind in KINDS if (one := best(found, budget, kind))}
    shared = set.intersection(*map(set, ones.values()))
    return {kind: mean(one[seed] for seed in shared) for kind, one in ones.items()}


def best_table() -> list[list[str]]:
    """A line for a model, in a cell the best of each kind over the seeds that all of them have, the lowest bold."""
    lines = [["fitted / ours / diffusers'", *map(str, BUDGETS)]]
    for quantized in (False, True):
        for label, found in runs_of(quantized).values():
            cells = []
            for budget in BUDGETS:
                means = best_means(found, budget)
                low = min(means.values())
                cells.append(
                    " / ".join(bold(f"{means[k]:.2f}", means[k] == low) if k in means else "-" for k in KINDS)
                )
            lines.append([label + " W8A8" * quantized, *cells])
    return lines


def seeds_table(quantized: bool) -> list[list[str]]:
    """A line for a sampler: the mean of the seeds ± half of their reach; the lowest of a model's column bold."""
    lines = [["", "sampler", *map(str, BUDGETS)]]
    for label, found in runs_of(quantized).values():
        rows = {name: found[name] for name in found if set(found[name]) & set(BUDGETS)}
        low = {budget: best(rows, budget) for budget in BUDGETS}
        for place, name in enumerate(rows):
            cells = [figure(rows[name].get(budget, {}), low[budget]) for budget in BUDGETS]
            lines.append(["" if place else label, name, *cells])
    return lines


def figure(seeds: dict[int, float], low: dict[int, float]) -> str:
    """ "3.77 ± 0.08", bold where it is the lowest; "(2 of 3 seeds)" where it has fewer; empty: not run."""
    if not seeds:
        return ""
    values = list(seeds.values())
    reach = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    fewer = f" ({len(values)} of {len(low)} seeds)" if len(values) < len(low) else ""
    return bold(f"{mean(values):.2f}", seeds == low) + reach + fewer


def gains_table() -> list[list[str]]:
    """By how much feature-FID is lower, from the least to the most of the seeds; below 0 it is higher."""
    lines = [["", "", *map(str, BUDGETS)]]
    for label, found in runs_of(False).values():
        for one, other in (("fitted", "ours"), ("fitted", "diffusers"), ("ours", "diffusers")):
            cells = []
            for budget in BUDGETS:
                ours, theirs = best(found, budget, one), best(found, budget, other)
                gains = [theirs[seed] - ours[seed] for seed in ours]
                cells.append(
                    " to ".join(f"{round(end, 2) + 0.0:.2f}" for end in (min(gains), max(gains))) if gains else ""
                )
            lines.append([label, f"{one} ahead of {other}", *cells])
            label = ""
    return lines


def fifty_table() -> list[list[str]]:
    """10 evaluations of the default, our best by name and a fit, as ratios to 50 of DDIM; seed 0 alone has 50."""
    lines = [["seed 0", "DDIM, 50", *(one for name in TEN for one in (name, "ratio"))]]
    for quantized in (False, True):
        for model, (label, found) in runs_of(quantized).items():
            ours = {name: rows[10][0] for name, rows in found.items() if kind_of(name) == "ours" and 10 in rows}
            first = min(ours, key=ours.__getitem__)
            fit = found[FOLLOWS if quantized else "fitted"]
            slow = fifty(found, model, quantized)
            line = [label + " W8A8" * quantized, f"{slow:.2f}"]
            fits = [fit.get(budget, {}).get(0) for budget in (8, 10)]
            for fast, name in zip((ours["deis"], ours[first], *fits), ("", f" `{first}`", "", ""), strict=True):
                line += [f"{fast:.2f}{name}", f"{fast / slow:.3f}"] if fast else ["", ""]
            lines.append(line)
    return lines


def fifty(found: Found, model: str, quantized: bool) -> float:
    """feature-FID of 50 DDIM steps from seed 0: of this run, else of the older one."""
    for name in ("ddim", "diffusers/ddim"):
        if name in found and 50 in found[name]:
            return found[name][50][0]
    return older(model, quantized)["diffusers/ddim", 50]["feature_fid"]


def older(model: str, quantized: bool = False) -> dict[tuple[str, int], dict]:
    """(sampler, budget) -> row, of the runs of one seed and many samplers."""
    file = f"samplers-{model.removesuffix('-cifar10')}-w8a8.json" if quantized else f"samplers-{model}.json"
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    return {(row["sampler"], row["budget"]): row for row in rows}


def others_table() -> list[list[str]]:
    """Samplers of which one seed was run, the UNet / the DiT; in brackets the evaluations used, where fewer."""
    budgets = (5, 6, 8, 10, 15, 20, 50)
    runs = [older("unet-cifar10"), older("dit-cifar10")]
    lines = [["UNet / DiT", *map(str, budgets)]]
    for name in OTHERS:
        cells = []
        for budget in budgets:
            rows = [run.get((name, budget)) for run in runs]
            used = {row["evaluations"] for row in rows if row} - {budget}
            figures = " / ".join(f"{row['feature_fid']:.2f}" if row else "-" for row in rows)
            cells.append(figures + "".join(f" ({n})" for n in used) if any(rows) else "")
        lines.append([name, *cells])
    return lines


def bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


TABLES = {
    "best": best_table,
    "seeds": lambda: seeds_table(False),
    "w8a8": lambda: seeds_table(True),
    "gains": gains_table,
    "fifty": fifty_table,
    "others": others_table,
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=tuple(TABLES))
    head, *lines = TABLES[parser.parse_args(words).table]()
    print("| " + " | ".join(head) + " |", "|---" * len(head) + "|", sep="\n")
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    run(main)
