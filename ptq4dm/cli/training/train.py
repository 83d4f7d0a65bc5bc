"""`ptq4dm train`: a model learns from the pictures of a folder, on integers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from ...errors import UserError
from ...files.claim import claimed_whole
from ...files.log import read_lines
from ...files.places import make_parent
from ...files.result_folder import check_replaceable, result_folder
from ...layers.shift.convert import kernels_told
from ...pipelines.load import load_pipeline
from ...training import run as training_run
from ...training.config import ShiftQuantConfig
from ...training.train import train
from ..flags import add_flags, given, options_of
from ..options import add_model, device_of, settings_of, trained_dtype_of
from ..output import main_process, result, say, say_run

GOES_ON = "the same command with --resume"
FLAGS = {"images": "--num-images"}  # --images is the folder of them
RECORD = "training.json"  # beside model_index.json: the model that was trained, and settings
BUDGET = ("images", "minutes")
PRODUCTS = ("bits", "weight_bits", "activation_bits", "gradient_bits", "groups", "wide", "served", "norm")


def add(parser) -> None:
    add_model(parser)
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="pictures to learn from; one sub-folder a class, if it has any"
    )
    parser.add_argument("--output", default="out/trained", help="folder of the model; its run is in OUTPUT.run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT.run")
    budget = parser.add_argument_group("budget")
    budget.add_argument(
        "--num-images",
        type=int,
        help=f"that the model learns from, in all, --batch-size in a step ({ShiftQuantConfig.images})",
    )
    add_flags(budget, ShiftQuantConfig, ("minutes",))
    add_flags(parser.add_argument_group("products"), ShiftQuantConfig, PRODUCTS)
    rest = set(options_of(ShiftQuantConfig)) - {*BUDGET, *PRODUCTS}
    add_flags(parser.add_argument_group("training"), ShiftQuantConfig, rest)


def run(args) -> None:
    values = {name: value for name, value in given(args, ShiftQuantConfig).items() if name != "images"}
    if args.num_images is not None:
        values["images"] = args.num_images
    config, output = ShiftQuantConfig(**values, precision=trained_dtype_of(args)), Path(args.output)
    if not Path(args.images).is_dir():
        raise UserError(f"{args.images} is not a folder of images.")
    make_parent(output)
    with claimed_whole(output, settings_of(args, "resume")) if main_process() else nullcontext():
        check_replaceable(output, RECORD, "train")
        _train(args, config, output)


def _train(args, config: ShiftQuantConfig, output: Path) -> None:
    pipe = load_pipeline(args.model, torch.float32, device_of(args))
    folder = output.with_name(f"{output.name}.run")
    trained = train(pipe, args.images, config, folder, args.resume)
    if not main_process():
        return
    lines = read_lines(folder / training_run.LOG)
    learnt = max((line["images"] for line in lines if line["stage"] == "evaluation"), default=0)
    more = "" if learnt >= config.images else " (--resume goes on)"
    start = next(line for line in lines if line["stage"] == "start")
    share = start["kept_bytes"] / start["kept_bytes_in_floats"]
    products = f" ({kernels_told(start['kernels'])})" if start.get("kernels") else ""
    say(f"{start['layers']} layers on integers{products}; a step keeps {share:.0%} of the bytes that floats would")
    begun = start.get("learning_rate", config.learning_rate)
    if begun != config.learning_rate:
        say(f"the learning rate was {begun:g} at the start, and {config.learning_rate:g} in this call")
    losses = [line for line in lines if "held_out" in line]
    if losses:
        number = losses[-1].get("pictures")
        of = {None: "", 1: " on 1 picture, at one time"}.get(number, f" on {number} pictures, each at one time")
        say(f"held-out loss {losses[-1]['held_out']:.4f}{of}")
    say_run(folder)
    result(model=args.model, images=learnt, of=config.images, run=folder, log=lines)
    facts = {"model": str(args.model), **config.identity(), "norm": config.norm}
    facts |= {"images": learnt, "learning_rate": config.learning_rate}
    with result_folder(output, RECORD, facts) as new:
        trained.save_pretrained(new)
    asked = f" of {config.images}" if learnt <= config.images else ""
    say(f"trained on {learnt}{asked} images{more}: {output}")
    result(output=output)
