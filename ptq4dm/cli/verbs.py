"""The verbs: which there are, their help, and how one runs.

A verb's file is imported, and with it PyTorch, when that verb is called for.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from ..starting import INTERRUPTED
from ..version import __version__
from .failures import complain, in_flags, told
from .parser import Parser, add_command, add_output, flags_of
from .process import interrupted

VERBS = {
    "collect": "Record what a model sees while it samples, and measure its layers' inputs.",
    "quantize": "Quantize a model and save it as a diffusers pipeline.",
    "allocate": "Choose each layer's format under budgets of measured time and bytes; a plan for quantize.",
    "convert": "Load a file that another tool quantized (GGUF, ComfyUI), or write one for ComfyUI.",
    "generate": "Make images: one PNG per seed.",
    "evaluate": "Measure a model: Frechet distance, errors against full precision, speed, bytes.",
    "compare": "Put several quantized models in one table, one picture and one page with a slider.",
    "distill": "Distil a model to one step (DisBack), and save it as a diffusers pipeline.",
    "train": "Train a model on the pictures of a folder, its products on integers.",
    "personalize": "Learn a token or a class from a few images, by forward passes of a packed model.",
    "bench": "Compare samplers; find the kernels' fastest settings on a GPU; model an accelerator.",
    "info": "What a model is: layers, formats, kernels, bytes.",
    "completion": "Print a script that completes commands in a shell: bash, zsh or fish.",
}
FOLDERS = {
    "convert": "conversion.",
    "personalize": "training.",
    "train": "training.",
}  # whose file is not in this one
STATUSES = (
    "Exit status: 0 done, 1 out of memory, 2 wrong input or a place that cannot be written, 130 interrupted, "
    "141 nobody read the output."
)


def build_parser(verbs=tuple(VERBS)) -> Parser:
    """Return the parser, with the options of `verbs`; the other verbs are there by name only."""
    text = "Quantize, sample and measure diffusion models."
    parser = Parser(prog="ptq4dm", description=text, epilog=STATUSES)
    parser.add_argument("--version", action="version", version=f"ptq4dm {__version__}")
    add_output(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, text in VERBS.items():
        command = add_command(commands, name, text)
        if name in verbs:
            verb_module(name).add(command)
    return parser


def verb_module(name: str):
    """The module of a verb: `add(parser)`, `run(args)`, and, if it can go on, `GOES_ON`, by which command;
    `FLAGS`, name -> flag, of options whose flags have other names."""
    return import_module(f".{FOLDERS.get(name, '')}{name}", __package__)


def run(arguments: list[str]) -> int:
    """Run a command; returns the exit status. Raises SystemExit where the parser ends it."""
    verb, going_on = next((text for text in arguments if not text.startswith("-")), None), ""
    flags: dict[str, str] = {}
    try:
        parser = build_parser([verb])
        args = parser.parse_args(arguments)
        module = verb_module(args.command)
        flags = flags_of(parser) | getattr(module, "FLAGS", {})
        if hasattr(module, "GOES_ON"):
            going_on = f"; {module.GOES_ON} goes on where it stopped"
        _work(module, args)
    except KeyboardInterrupt:
        complain(f"interrupted{going_on}")
        return INTERRUPTED
    except Exception as error:
        if interrupted():  # a library made an error of its own of it
            complain(f"interrupted{going_on}")
            return INTERRUPTED
        failure = told(error)
        if failure is None:
            raise
        status, sentence = failure
        complain(f"ptq4dm {verb}: {in_flags(sentence, flags)}")
        return status
    finally:
        leave_process_group()
    return 0


def _work(module: Any, args: argparse.Namespace) -> None:
    from ..interrupts import terminated_as_interrupted
    from .output import printing
    from .process import working

    with working(), terminated_as_interrupted(), printing(args):
        module.run(args)


def leave_process_group() -> None:
    """Processes that end without this may die at exit after all their work is done."""
    states = getattr(sys.modules.get("accelerate"), "PartialState", None)
    if states is not None and states._shared_state:
        states().destroy_process_group()
