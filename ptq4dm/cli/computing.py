"""The options of how a network is computed: `--optimize`, `--engine`, and `--reuse` of its deep part."""

from __future__ import annotations

import os
from typing import Any

from ..caching.plan_steps import MOST_REUSE, StepPlanConfig, plan_cached_steps
from ..caching.step_plan import StepPlan
from ..errors import UserError
from ..inference import engines
from ..inference.optimize import optimize
from ..inference.report import Optimized
from ..pipelines.load import EMBEDDED, folder_of
from .options import steps_of


def add_optimize(parser) -> None:
    text = "what is fastest on this device: fused, blocks compiled, CUDA graphs; the first images take minutes"
    parser.add_argument("--optimize", action="store_true", help=text)
    text = (
        "with --optimize: memory such as 4GB for weights of 4 bits that are kept in 8, so that no call unpacks them"
    )
    parser.add_argument("--weight-cache", metavar="SIZE", help=text)
    text = "with --optimize: auto, self-attention in 8 bits where that is measured to be faster on this GPU"
    parser.add_argument("--attention", choices=("auto",), help=text)
    text = "run the denoiser on the CPU through another library: openvino (pip install 'ptq4dm[openvino]')"
    parser.add_argument("--engine", help=text)


def check_optimize(args) -> None:
    """Before anything is loaded: flags of `add_optimize` and `add_reuse` that do not go together are a UserError."""
    more = {"weight-cache": args.weight_cache, "attention": args.attention}
    if not args.optimize and (name := next((name for name, value in more.items() if value is not None), "")):
        raise UserError(f"--{name} is a part of --optimize; give both.")
    engines.check(args.engine, None, None, {})
    if args.engine and args.optimize:
        raise UserError("--optimize is for PyTorch's own kernels; leave it out with --engine.")
    if args.engine and args.reuse is not None:
        raise UserError(
            "--reuse is for PyTorch's own forward, and --engine computes a network whole; give one of them."
        )
    if args.reuse is not None and (share := _share(args.reuse)) is not None and not 0 < share <= MOST_REUSE:
        raise UserError(f"--reuse is a share of steps above 0, up to {MOST_REUSE}, or a JSON file; got {args.reuse}.")


def optimized(args, model, pipe) -> Optimized | None:
    """What `--optimize` and `--engine` make of a pipeline; None without them. An engine's conversions are saved in
    the model's folder, if it is a user's own."""
    if args.engine is None:
        return optimize(pipe, weight_cache=args.weight_cache, attention=args.attention) if args.optimize else None
    folder = folder_of(model)
    own = str(model) not in EMBEDDED and folder.is_dir() and os.access(folder, os.W_OK)
    return optimize(pipe, engine=args.engine, cache=folder / args.engine if own else None)


def add_reuse(parser) -> None:
    text = (
        "steps that reuse the deep part of the network: the share of them, such as 0.4, planned for this model and "
    )
    text += "sampler first; or the JSON file of a plan"
    parser.add_argument("--reuse", metavar="SHARE|JSON", help=text)


def reused(args, pipe, conditioning: dict) -> StepPlan | None:
    """The plan that `--reuse` names, or one made for this pipeline; None without it. conditioning: of `sample`."""
    if args.reuse is None:
        return None
    if (share := _share(args.reuse)) is None:
        return StepPlan.load(args.reuse)
    config = StepPlanConfig(num_inference_steps=steps_of(args, pipe), reuse=share)
    return plan_cached_steps(pipe, config, **conditioning)


def _share(text: str) -> float | None:
    """The number that a text is; None for the name of a file."""
    try:
        return float(text)
    except ValueError:
        return None


def conditions(args, optimized: bool, plan: StepPlan | None) -> dict[str, Any]:
    """What decides pictures and is in no folder of the model: how it was optimized, and which steps reuse a part."""
    found: dict[str, Any] = {}
    if optimized:  # its pictures differ by rounding, and with another attention by more
        found |= {"engine": args.engine} if args.engine else {"optimized": True}
        found |= {"attention": args.attention} if args.attention else {}
    if plan is not None:
        found["reuse"] = {"weights": [list(row) for row in plan.weights], "depth": plan.depth}
    return found
