"""The command line's entry: which verbs there are, their help, and the exit status.

A verb's file is imported, and with it PyTorch, when that verb is called for.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from ..errors import UserError
from ..version import __version__

VERBS = {
    "collect": "Record what a model sees while it samples, and measure its layers' inputs.",
    "quantize": "Quantize a model and save it as a diffusers pipeline.",
    "generate": "Make images: one PNG per seed.",
    "evaluate": "Measure a model: Frechet distance, errors against full precision, speed, bytes.",
    "distill": "Distil a model to one step (DisBack), and save it as a diffusers pipeline.",
    "bench": "Compare samplers; find the fastest settings of the kernels on a GPU.",
    "info": "What a model is: layers, formats, kernels, bytes.",
}


class Parser(argparse.ArgumentParser):
    """One plain line and exit status 2 for wrong input."""

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def add_command(commands, name: str, text: str) -> Parser:
    return commands.add_parser(name, help=text, description=text, formatter_class=Help)


def build_parser(verbs=tuple(VERBS)) -> Parser:
    """Return the parser, with the options of `verbs`; the other verbs are there by name only."""
    parser = Parser(prog="ptq4dm", description="Quantize, sample and measure diffusion models.")
    parser.add_argument("--version", action="version", version=f"ptq4dm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, text in VERBS.items():
        command = add_command(commands, name, text)
        if name in verbs:
            verb_module(name).add(command)
    return parser


def verb_module(name: str):
    """The module of a verb: `add(parser)`, `run(args)`, and, if it can go on, `GOES_ON`, by which command."""
    return import_module(f".{name}", __package__)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 130 (interrupted) or 2 (wrong input)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = next((text for text in arguments if not text.startswith("-")), None)
    args = build_parser([verb]).parse_args(arguments)
    module = verb_module(args.command)
    try:
        module.run(args)
    except UserError as error:
        print(f"ptq4dm {args.command}: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        if not isinstance(error, _kernel_settings()):
            raise
        print(f"ptq4dm {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = f"; {module.GOES_ON} goes on where it stopped" if hasattr(module, "GOES_ON") else ""
        print("interrupted" + advice, file=sys.stderr)
        return 130
    finally:
        leave_process_group()
    return 0


def _kernel_settings() -> type[ValueError]:
    """The error of a damaged file of kernels' settings: kernels do not know of UserError."""
    return import_module("..kernels.runtime.settings", __package__).DamagedSettings


def leave_process_group() -> None:
    """Processes that end without this may die at exit after all their work is done."""
    from accelerate import PartialState

    if PartialState._shared_state:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
