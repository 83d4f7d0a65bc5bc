"""A block in which C code may print to the process's standard output: lines of the solver's are dropped."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STDOUT = 1


@contextmanager
def hushed(prefix: bytes) -> Iterator[None]:
    """Drop lines that begin with `prefix` from what is printed in this block; all else is printed at its end.

    HiGHS, scipy's solver, has a debugging line in it that no option turns off; it would stand before --json's object.
    """
    try:
        kept = os.dup(STDOUT)
    except OSError:  # the process has no standard output
        yield
        return
    with tempfile.TemporaryFile() as held:
        _flush()
        os.dup2(held.fileno(), STDOUT)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, STDOUT)
            os.close(kept)
            held.seek(0)
            rest = [line for line in held if not line.startswith(prefix)]
            if rest:
                os.write(STDOUT, b"".join(rest))


def _flush() -> None:
    """Print what Python and C have not printed yet."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
    with suppress(OSError, AttributeError, TypeError):  # where C's library is not found so
        ctypes.CDLL(None).fflush(None)
