"""One picture for each kind of model: what few steps come to with which sampler.

    python scripts/comparisons/draw_samplers.py --output assets/pictures

Reads scripts/results alone: feature-FID from samplers-*.json (`ptq4dm bench samplers`). Writes few-steps-unet.png,
few-steps-dit.png, few-steps-flow.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from palette import few_colours

from ptq4dm.errors import UserError, run
from ptq4dm.files.outside import read_json
from ptq4dm.samplers.comparison.table import plot_rows

RESULTS = Path(__file__).resolve().parents[1] / "results"
MOST = 20  # evaluations: behind them nearly all agree
BENCH = (
    *("t_ab3/quad", "ipndm2/linear", "rho_rk-3heun/edm", "diffusers/unipc", "diffusers/unipc-karras"),
    *("diffusers/dpm++2m", "diffusers/deis", "diffusers/euler", "diffusers/ddim"),
)
FLOW = (
    *("deis", "t_ab1/linear/velocity", "diffusers/unipc", "diffusers/dpm++2m", "diffusers/deis"),
    *("diffusers/heun", "diffusers/euler"),
)
PICTURES = {
    "unet": ("samplers-unet-cifar10.json", BENCH, "alpha_bar, UNet (unet-cifar10)"),
    "dit": ("samplers-dit-cifar10.json", BENCH, "alpha_bar, DiT (dit-cifar10)"),
    "flow": ("samplers-flow-dit-cifar10.json", FLOW, "flow matching, DiT (flow-dit-cifar10)"),
}


def draw(kind: str, folder: Path, results: Path = RESULTS) -> Path:
    """The picture of a kind of PICTURES. Raises UserError where rows of a sampler, or matplotlib, are missing."""
    file, samplers, title = PICTURES[kind]
    found = read_json(results / file)
    rows = [row for name in samplers for row in found["rows"] if row["sampler"] == name and row["budget"] <= MOST]
    if lacking := set(samplers) - {row["sampler"] for row in rows}:
        raise UserError(f"{file} has no rows of {', '.join(sorted(lacking))}.")
    path = folder / f"few-steps-{kind}.png"
    if not plot_rows(f"{title}, {found['settings']['num_images']:,} images", rows, path):
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
