"""The errors that users cause: the message is a sentence that says what was wrong and what to do."""

import re
import sys
from collections.abc import Callable

LONGEST = 300  # characters of one word; no name of a file has more
LONG_WORD = re.compile(rf"[^\s/]{{{LONGEST + 1},}}")


class UserError(ValueError):
    """Wrong input. The command line prints the message on one line and exits with status 2.

    The message can be printed, whatever it was made of: it often holds names and values from files of others.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in args))


class DamagedFile(UserError):
    """A file from outside that cannot be taken as it is: cut short, changed, of another kind, or dangerous."""


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
