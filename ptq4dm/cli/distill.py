"""`ptq4dm distill`: a one-step student of a model."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from ..files.claim import claimed_whole
from ..files.places import make_parent
from ..files.result_folder import check_replaceable
from ..layers.shift.convert import kernels_told
from ..pipelines.load import load_pipeline
from ..samplers.distillation import disback
from ..samplers.distillation.config import DisBackConfig
from ..samplers.distillation.log import read_log
from ..samplers.distillation.run import alone_in, check_teacher
from ..samplers.distillation.student import RECORD, save_student
from .flags import add_flags, given, options_of
from .options import add_model, device_of, settings_of, trained_dtype_of
from .output import main_process, result, say, say_run

GOES_ON = "the same command with --resume"
BUDGET = ("images", "minutes")


def add(parser) -> None:
    add_model(parser)
    parser.add_argument("--output", default="out/student", help="folder of the student; its run is in OUTPUT.run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT.run")
    add_flags(parser.add_argument_group("budget"), DisBackConfig, BUDGET)
    add_flags(parser.add_argument_group("training"), DisBackConfig, set(options_of(DisBackConfig)) - set(BUDGET))


def run(args) -> None:
    config = DisBackConfig(**given(args, DisBackConfig), precision=trained_dtype_of(args))
    output = Path(args.output)
    make_parent(output)
    with claimed_whole(output, settings_of(args, "resume")) if main_process() else nullcontext():
        check_replaceable(output, RECORD, "distill")
        _distill(args, config, output)


def _distill(args, config: DisBackConfig, output: Path) -> None:
    pipe = load_pipeline(args.model, torch.float32, device_of(args))
    folder = output.with_name(f"{output.name}.run")
    check_teacher(pipe, config)
    with alone_in(folder, pipe, config, args.resume):  # until the student is saved: it is of this run
        student = disback.distill(pipe, config, folder, args.resume)
        if main_process():
            lines = [line for line in read_log(folder / "log.jsonl") if line["stage"] == "evaluation"]
            learnt = max((line["images"] for line in lines), default=0)
            more = "" if learnt >= config.images else " (--resume goes on)"
            say(f"{learnt} of {config.images} images learnt from{more}")
            if lines and "kernels" in lines[-1]:
                say(f"the student trains on integers: {kernels_told(lines[-1]['kernels'])}")
            say_run(folder)
            result(model=args.model, images=learnt, of=config.images, run=folder, log=lines)
            save_student(student, {"model": str(args.model), **config.identity()}, output)
            say(f"one-step student after {learnt} of {config.images} images{more}: {output}")
            result(output=output)
