"""The errors that users cause: the message is a sentence that says what was wrong and what to do."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Wrong input. The command line prints the message on one line and exits with status 2."""


class DamagedFile(UserError):
    """A file from outside that cannot be taken as it is: cut short, changed, of another kind, or dangerous."""


def run(main: Callable[[], None]) -> None:
    """A script's main: wrong input ends it with one line and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
