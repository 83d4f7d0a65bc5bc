"""The verbs: which there are, their help, and how one runs.

A verb's file is imported, and with it PyTorch, when that verb is called for.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from ..errors import UserError
from ..starting import INTERRUPTED
from ..version import __version__
from .failures import complain, in_flags, told
from .parser import Parser, add_command, add_output, flags_of, known_words
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
    "bench": "benches.",
    "convert": "conversion.",
    "personalize": "training.",
    "train": "training.",
}  # whose file is not in this one
STATUSES = (
    "Exit status: 0 done, 1 out of memory, 2 wrong input or a place that cannot be written, 130 interrupted, "
    "141 nobody read the output."
)

TYPES = {"int": int, "float": float}
PRINTING = ("--help", "--quiet", "--json")  # `add_command` adds them


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
        if "torch" not in sys.modules:  # where it is, there is nothing to win, and there may be methods of one's own
            refuse(arguments)
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
        complain(f"ptq4dm {_whole(arguments)}: {in_flags(sentence, flags)}")
        return status
    finally:
        leave_process_group()
    return 0


def _whole(arguments: list[str]) -> str:
    """The verb with its subject, where it has one, as the parser tells it: "generate", "bench samplers"."""
    verb, *rest = [text for text in arguments if not text.startswith("-")]
    return whole if rest and (whole := f"{verb} {rest[0]}") in known_words() else verb


def _work(module: Any, args: argparse.Namespace) -> None:
    from ..files.places import empty_taken_back
    from ..interrupts import terminated_as_interrupted
    from .output import printing
    from .process import working

    with working(), terminated_as_interrupted(), printing(args), empty_taken_back():
        module.run(args)


def leave_process_group() -> None:
    """Processes that end without this may die at exit after all their work is done."""
    states = getattr(sys.modules.get("accelerate"), "PartialState", None)
    if states is not None and states._shared_state:
        states().destroy_process_group()


# --------------------------------------------------------------------------------------- before the long imports


def refuse(arguments: list[str]) -> None:
    """Raises UserError, or SystemExit as the parser does, for wrong input that can be told before PyTorch is
    imported, which takes seconds, on a busy machine a minute.

    words.json, which completion is made from, holds what the parser says: a parser made of it refuses flags that
    there are not, and values that are no number or none of the choices, in the same words. Then come a method, a
    model and a store that are not there. Whatever it lets pass, the whole parser and the verb look at again.
    """
    verb = next((text for text in arguments if not text.startswith("-")), None)
    words = known_words()
    if verb is None or verb not in words or {"-h", "--help"} & {*arguments} or verb == "completion":
        return
    from ..files.missing import check_store
    from ..pipelines.embedded import EMBEDDED, check_name

    args = _quick_parser(words, verb).parse_args(arguments)
    flags = words[_path(words, verb, args)]["flags"]
    for flag, what in flags.items():
        value = getattr(args, _name(flag), None)
        if what is None or not isinstance(value, str) or not value:
            continue
        if flag == "--method" and what["choices"] and value not in what["choices"]:
            raise UserError(f"quantization method {value!r} is unknown; choose from {', '.join(what['choices'])}.")
        if flag == "--model" and what["choices"] == [*EMBEDDED]:
            check_name(value)
        if flag == "--calibration":
            check_store(value)


def _quick_parser(words: dict[str, dict], verb: str) -> Parser:
    """The parser of one verb, as far as the words tell it."""
    parser = Parser(prog="ptq4dm")
    parser.add_argument("--version", action="store_true")
    add_output(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, text in VERBS.items():
        command = add_command(commands, name, text)
        if name == verb:
            _fill(command, words, verb)
    return parser


def _fill(parser: Parser, words: dict[str, dict], path: str) -> None:
    below = [name for name in words[path]["commands"] if f"{path} {name}" in words]
    if below:
        subjects = parser.add_subparsers(dest="subject", required=True, metavar="subject", parser_class=Parser)
        for name in below:
            _fill(add_command(subjects, name, ""), words, f"{path} {name}")
    for name, facts in words[path].get("arguments", {}).items():
        parser.add_argument(name, **facts)
    for flag, what in words[path]["flags"].items():
        if flag in PRINTING:
            continue
        if what is None:
            parser.add_argument(flag, dest=_name(flag), action="store_true")
            continue
        facts = {"nargs": what["nargs"], "type": TYPES.get(what["type"])}
        if what["closed"]:
            facts["choices"] = [TYPES.get(what["type"], str)(one) for one in what["choices"]]
        if what["files"]:
            facts["metavar"] = "FILE"  # an empty name is refused
        parser.add_argument(flag, dest=_name(flag), **facts)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _path(words: dict[str, dict], verb: str, args: argparse.Namespace) -> str:
    subject = getattr(args, "subject", None)
    return f"{verb} {subject}" if subject else verb
