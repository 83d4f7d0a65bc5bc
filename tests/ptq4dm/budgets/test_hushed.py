"""Lines of C code that are dropped from standard output, and those that are not."""

import ctypes
import os

import pytest

from ptq4dm.budgets.hushed import hushed


def test_only_lines_of_the_solver_are_dropped(capfd):
    libc = ctypes.CDLL(None)
    print("before")
    with hushed(b"Highs"):
        libc.printf(b"HighsMip says something\n")
        os.write(1, b"of another thread\n")
        print("Higher")
    print("after")
    first, *between, last = capfd.readouterr().out.splitlines()
    assert (first, last) == ("before", "after") and sorted(between) == ["Higher", "of another thread"]


def test_standard_output_comes_back_after_an_error(capfd):
    with pytest.raises(RuntimeError), hushed(b"Highs"):
        os.write(1, b"Highs\n")
        raise RuntimeError
    os.write(1, b"here\n")
    assert capfd.readouterr().out == "here\n"
