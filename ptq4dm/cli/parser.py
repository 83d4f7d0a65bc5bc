"""The parser: one plain line and exit status 2 for wrong input, with the name that was perhaps meant."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from ..errors import meant
from .failures import WRONG_INPUT, complain

LONGEST = 200  # characters of a wrong value that are repeated
WORDS = Path(__file__).with_name("words.json")
PATHS = ("MODEL", "DIR", "PNG", "JSON", "NPZ", "FILE")  # what stands for a file or a folder in the help
PATH_FLAGS = (
    "model",
    "output",
    "reference",
    "inception_weights",
    "lpips_weights",
    "clip",
    "image_reward",
)  # which say by their names what they are


def known_words() -> dict[str, dict]:
    """What completion's `words_of` said when words.json was written."""
    return json.loads(WORDS.read_text(encoding="utf-8"))


def names_file(action: argparse.Action) -> bool:
    """Whether a flag's value is the name of a file, a folder or a model."""
    return action.metavar in PATHS or action.dest in PATH_FLAGS


class Parser(argparse.ArgumentParser):
    """argparse's, but for how it tells what is wrong. Flags are whole names: the start of one may be another's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and message.endswith(f"required: {action.metavar}"):
                message += f" (choose from {', '.join(action.choices)})"
        complain(f"{self.prog}: {message}")
        raise SystemExit(WRONG_INPUT)

    def parse_known_args(self, args=None, namespace=None):
        """Of a verb, too: so the verb itself refuses what it does not know, and names what it does."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            flags = [text.partition("=")[0] for text in rest if text.startswith("-")]
            near = meant(flags[0], self._option_string_actions) if flags else ""
            self.error(f"unrecognized arguments: {shortened(' '.join(rest))}{near}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = meant(str(value), known)
            text = f"invalid choice: {shortened(repr(value))} (choose from {', '.join(known)}){near}"
            raise argparse.ArgumentError(action, text)

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        """argparse drops "--", of `--seed=--` too, and would go on with an empty list."""
        if words == ["--"] and action.option_strings and action.nargs in (None, "+"):
            raise argparse.ArgumentError(action, "expected an argument; got '--'")
        return super()._get_values(action, words)

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """An empty name, as of a shell's variable that is not set, would be the folder we are in."""
        if not text and names_file(action):
            raise argparse.ArgumentError(action, "expected a name; got ''")
        return super()._get_value(action, text)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Name of an option in Python -> its flag, of a parser and all that it leads to."""
    found: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= flags_of(command)
        elif action.option_strings:
            found[action.dest] = action.option_strings[0]
    return found


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def add_command(commands: Any, name: str, text: str) -> Parser:
    """Add a verb, or a subject of one: all print alike."""
    parser = commands.add_parser(name, help=text, description=text, formatter_class=Help)
    add_output(parser)
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --json. Neither has a default, so that they may stand before a verb's name as well as after."""
    group = parser.add_argument_group("printing")
    text = "no progress bars, no notes, no results: errors only"
    group.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help=text)
    text = "print one JSON object on stdout: all that would be printed, and no text"
    group.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
