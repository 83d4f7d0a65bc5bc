"""One picture for each kind of model: what few steps come to with which sampler.

    python scripts/comparisons/draw_samplers.py --output assets/pictures

Reads scripts/results alone: samplers-seeds.jsonl, of which the means of three seeds are drawn (not what lacks a
seed), and for more samplers one seed of samplers-*.json (`ptq4dm bench samplers`). Writes few-steps-unet.png,
few-steps-dit.png and few-steps-flow.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from palette import few_colours
from sampler_seeds import most_seeds, rows_of

from ptq4dm.errors import UserError, run
from ptq4dm.files.outside import read_json
from ptq4dm.samplers.comparison.table import plot_rows

RESULTS = Path(__file__).resolve().parents[1] / "results"
MOST = 20  # evaluations: behind them nearly all agree
ONE_SEED = ("rho_rk-3heun/edm", "diffusers/deis", "diffusers/ddim")
PICTURES = {
    "unet": ("unet-cifar10", ONE_SEED, "alpha_bar, UNet"),
    "dit": ("dit-cifar10", ONE_SEED, "alpha_bar, DiT"),
    "flow": ("flow-dit-cifar10", ("diffusers/deis", "diffusers/heun"), "flow matching, DiT"),
}
"""Kind -> model, samplers that one seed alone was run of, title."""


def draw(kind: str, folder: Path, results: Path = RESULTS) -> Path:
    """The picture of a kind of PICTURES. Raises UserError where rows of a sampler, or matplotlib, are missing."""
    model, samplers, title = PICTURES[kind]
    found = rows_of(model, folder=results)
    rows = [
        {"sampler": name, "budget": budget, "evaluations": budget, "feature_fid": mean(seeds.values())}
        for name, budgets in found.items()
        for budget, seeds in budgets.items()
        if budget <= MOST and len(seeds) == most_seeds(found, budget)  # a seed moves all samplers alike
    ]
    file = f"samplers-{model}.json"
    one_seed = [
        row for row in read_json(results / file)["rows"] if row["sampler"] in samplers and row["budget"] <= MOST
    ]
    if lacking := set(samplers) - {row["sampler"] for row in one_seed}:
        raise UserError(f"{file} has no rows of {', '.join(sorted(lacking))}.")
    rows += [{**row, "sampler": f"{row['sampler']} (one seed)"} for row in one_seed]
    path = folder / f"few-steps-{kind}.png"
    if not plot_rows(f"{title} ({model}), 10,000 images, means of three seeds", rows, path):
        raise UserError("the pictures need matplotlib; install it with `pip install ptq4dm[plot]`.")
    few_colours(path)
    return path


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=tuple(PICTURES), default=list(PICTURES))
    parser.add_argument("--output", type=Path, default=Path("assets/pictures"))
    args = parser.parse_args(words)
    for kind in args.kinds:
        print(f"picture: {draw(kind, args.output)}")


if __name__ == "__main__":
    run(main)
