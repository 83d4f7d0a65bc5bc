"""Ctrl-C while the command starts: one line and status 130, from the first import of this package on.

For the command alone: a program that imports this package keeps its own way. Only what Python has loaded anyway is
imported here, for the imports that follow are what this is about.
"""

import os
import signal
import sys

INTERRUPTED = 130  # as shells say it: 128 + SIGINT


def end(number: int, frame: object) -> None:
    """A signal's handler: nothing has begun, so nothing is to be put back."""
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def is_command() -> bool:
    """Whether this process was started as `ptq4dm ...` or `python -m ptq4dm ...`."""
    words = sys.orig_argv[1:]
    script = [os.path.basename(word) for word in words[:1]] == ["ptq4dm"]
    return script or "-m" in words and words[words.index("-m") + 1 :][:1] == ["ptq4dm"]


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
