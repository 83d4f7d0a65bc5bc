"""The errors that users cause: the message is a sentence that says what was wrong and what to do."""

import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches

LONGEST = 300  # characters of one word; no name of a file has more
NEAR = 200  # characters of a wrong name that are compared with those that there are
LONG_WORD = re.compile(rf"[^\s/]{{{LONGEST + 1},}}")


class UserError(ValueError):
    """Wrong input. The command line prints the message on one line and exits with status 2.

    The message can be printed, whatever it was made of: it often holds names and values from files of others.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in args))


class DamagedFile(UserError):
    """A file from outside that cannot be taken as it is: cut short, changed, of another kind, or dangerous."""


class UnknownOption(UserError, TypeError):
    """An option that a config does not have: a TypeError, too, as Python's own of an argument that nobody knows."""


def unknown_option(
    owner: str, unknown: Iterable[str], known: Iterable[str], holders: Iterable[str] = ()
) -> UnknownOption:
    """The error for options that `owner` ("RTNConfig") does not have: with the name that was meant, or with
    `holders`, the methods that have the first one, or with all that it has."""
    wrong, known, others = list(unknown), sorted(known), ", ".join(holders)
    elsewhere = f"; take a method that has it: {others}." if others else f"; it has {', '.join(known)}."
    near = elsewhere if others else meant(wrong[0], known) or elsewhere
    return UnknownOption(f"{owner} has no option {', '.join(wrong)}{near}")


def meant(text: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'collect'?", or "" where nothing is near."""
    near = get_close_matches(text[:NEAR], list(known), 1)
    return f"; did you mean '{near[0]}'?" if near else ""


def printable(text: str) -> str:
    """Return the text on one line: line ends as spaces, other characters that cannot be printed as escapes, words
    that are longer than any name cut."""
    joined = " ".join(text.splitlines()) if "\n" in text else text
    cut = LONG_WORD.sub(lambda word: f"{word[0][:LONGEST]} ...", joined)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def run(main: Callable[[], None]) -> None:
    """A script's main: wrong input ends it with one line and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
