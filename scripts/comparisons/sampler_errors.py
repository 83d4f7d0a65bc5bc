"""Samplers by their error: distance from the solution of the model's ODE, from the same noise.

    python scripts/comparisons/sampler_errors.py --images 16 --output out/flow-dit.json
    python scripts/comparisons/sampler_errors.py --model unet-cifar10 --images 4 --budgets 5 10 --output out/u.json

A figure is the median over images of the rms error of a pixel, images in [-1, 1], at so many evaluations of the
model. The solution ends at clean data, so samplers should: ours of models with alpha_bar do as `.../clean`. It is
that of Runge-Kutta of order 3 in `--truth` steps, on levels that crowd where the model changes fastest: at both ends
of a flow, at the data's end of the others. A row that the file has is not made again; it takes minutes on a CPU.
What pictures look like is another question: `ptq4dm bench samplers` measures feature-FID.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ptq4dm.files.rows import Rows
from ptq4dm.pipelines.denoiser import class_count, denoiser
from ptq4dm.pipelines.load import load_pipeline
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.comparison.compare import set_budget, solve

OF_FLOWS = (
    *("t_ab1/linear/velocity/corrected", "t_ab1/linear/velocity", "t_ab2/linear/velocity/corrected"),
    *("t_ab2/linear/velocity", "t_ab1/linear/epsilon/corrected", "t_ab1/linear/epsilon", "rho_rk-3heun/linear"),
    *("diffusers/unipc", "diffusers/dpm++2m", "diffusers/deis", "diffusers/euler", "diffusers/heun"),
)
OF_ALPHA_BAR = (
    *("t_ab3/quad/clean", "t_ab3/quad/clean/corrected", "t_ab2/quad/clean", "t_ab2/quad/clean/corrected"),
    *("ipndm2/linear/clean", "ipndm1/linear/clean/corrected", "diffusers/unipc"),
)
TRUTH = {True: "rho_rk-3heun/beta", False: "rho_rk-3heun/edm/clean"}  # of flows, and of others
FIRST_SEED = 10_000  # no image of it is in a reference or a calibration
ROW: dict = {"sampler": str, "budget": int, "evaluations": int, "error": (int, float), "seconds": (int, float)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="flow-dit-cifar10", help="folder, hub id or embedded name of a pixel model"
    )
    parser.add_argument("--samplers", nargs="+", help="as of `ptq4dm generate --sampler`; default: by the model")
    parser.add_argument("--budgets", nargs="+", type=int, default=[5, 8, 10, 20], help="evaluations of the model")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--truth", type=int, default=48, help="steps of the solution, three evaluations each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/sampler_errors.json"))
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> Rows:
    pipe = load_pipeline(args.model, device=args.device)
    model, config = denoiser(pipe).float().eval(), pipe.scheduler.config
    args.output.parent.mkdir(parents=True, exist_ok=True)
    flow = make_sampler("deis", config).config.prediction_type == "flow_prediction"
    settings = {"model": Path(args.model).name, "images": args.images, "truth": f"{TRUTH[flow]}, {args.truth} steps"}
    rows = Rows(args.output, settings, ROW)
    known = {(row["sampler"], row["budget"]) for row in rows}
    size, channels = model.config.sample_size, model.config.in_channels
    seeds = range(FIRST_SEED, FIRST_SEED + args.images)
    x = torch.cat([torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(s)) for s in seeds])
    classes = class_count(pipe)
    labels = None if classes is None else (torch.arange(args.images) % classes).to(args.device)
    x = x.to(args.device)
    exact = make_sampler(TRUTH[flow], config)
    exact.set_timesteps(args.truth, device=args.device)
    truth = solve(model, exact, x, labels)
    for name in args.samplers or (OF_FLOWS if flow else OF_ALPHA_BAR):
        for budget in args.budgets:
            if (name, budget) in known:
                continue
            began, sampler = time.time(), make_sampler(name, config)
            used = set_budget(sampler, budget, args.device)
            off = (solve(model, sampler, x, labels) - truth).square().flatten(1).mean(1).sqrt().median()
            row = {"sampler": name, "budget": budget, "evaluations": used, "error": round(float(off), 5)}
            rows.add({**row, "seconds": round(time.time() - began, 1)})
        print(line(name, args.budgets, rows), flush=True)
    return rows


def line(name: str, budgets: list[int], rows: Rows) -> str:
    """A row of the table; in brackets the evaluations that were used, where a budget cannot be."""
    found = {row["budget"]: row for row in rows if row["sampler"] == name}
    cells = [
        f"{found[b]['error']:.4f}" + (f" ({found[b]['evaluations']})" if found[b]["evaluations"] != b else "")
        for b in budgets
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    measure(parse_args())
