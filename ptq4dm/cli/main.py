"""The command line's entry, and the exit status:

    0      done
    1      the machine could not: no memory, a package that is missing; or a bug, with its traceback
    2      wrong input, or a place that cannot be written (a full disk, say), told on one line
    130    interrupted: Ctrl-C, SIGTERM, SIGHUP
    141    done, but nobody read what was printed (a closed pipe)

Everything else is imported in `main`, and the first of it looks after interrupts.
"""

import sys


def main(arguments: "list[str] | None" = None) -> int:
    """Run a command; returns the exit status. Without arguments it is that of this process, which it then owns.

    Raises SystemExit where the parser ends the command of given arguments: --help, --version, or wrong input (2).
    """
    if arguments is not None:
        return _run(arguments)
    from .process import owned

    return owned(lambda: _run(sys.argv[1:]))


def _run(arguments: "list[str]") -> int:
    from .verbs import run

    return run(arguments)


def __getattr__(name: str) -> object:
    """The parser, which was here once."""
    if name not in ("VERBS", "build_parser", "verb_module"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from . import verbs

    return getattr(verbs, name)


if __name__ == "__main__":
    sys.exit(main())
