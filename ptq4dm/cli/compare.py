"""`ptq4dm compare`: several quantized models beside the one they were made from: one table, one picture, one page."""

from __future__ import annotations

from pathlib import Path

from ..comparing.compare import compare
from ..comparing.config import CompareConfig
from ..comparing.report import PAGE, PICTURE, REPORT, format_comparison
from ..pipelines.load import check_loadable
from .flags import add_flags, given
from .options import (
    add_conditioning,
    add_device,
    add_sampler,
    add_steps,
    check_metric,
    conditioning_of,
    load,
    one_process,
    steps_of,
)
from .output import result, say

GOES_ON = "the same command"


def add(parser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="DIR", help="folders that `quantize` left, or models of that layout"
    )
    text = "what to compare with; quantized models know their original"
    parser.add_argument("--full-precision", metavar="MODEL", help=text)
    add_device(parser)
    add_flags(parser, CompareConfig)
    add_steps(parser)
    text = f"folder of {PAGE}, {PICTURE} and {REPORT}; images stay in it, and only missing ones are made"
    parser.add_argument("--output", default="out/comparison", help=text)
    add_sampler(parser)
    add_conditioning(parser)


def run(args) -> None:
    one_process(args)
    options = given(args, CompareConfig) | conditioning_of(args)
    config = CompareConfig(**options)
    config.check()
    check_metric(args, config.metric)
    for model in (*args.models, *([args.full_precision] if args.full_precision else [])):
        check_loadable(model)
    opened: list[str] = []

    def fitted(model: str):
        pipe = load(args, model)
        if not opened:  # the first is in full precision, and says how many steps
            config.num_inference_steps = steps_of(args, pipe)
            opened.append(model)
        return pipe

    def show(report: dict) -> None:
        say(format_comparison(report))
        result(**report)

    compare(args.models, args.full_precision, config, args.output, load=fitted, show=show)
    folder = Path(args.output)
    say(f"page:    {folder / PAGE}")
    say(f"picture: {folder / PICTURE}")
    result(page=folder / PAGE, picture=folder / PICTURE, report=folder / REPORT)
