"""The stack on which a thread meets signals, which outlives OpenVINO's models (sigaltstack(2)).

OpenVINO's CPU plugin puts a stack of its own in for each Core that uses it, and unmaps it with the Core. Where Cores
go in another order than they came, the thread is left with memory that is not there, and the next signal, Ctrl-C as
well, ends the process without a word: Python's handlers run on that stack.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LEAST = 64 << 10  # bytes

_stacks: dict[int, Any] = {}  # of each thread, never freed: the kernel has its address


class _Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def lasting_signal_stack() -> Iterator[None]:
    """Where a stack for signals was put in by this block, the thread has one that lasts after it."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = _stack()
    try:
        yield
    finally:
        now = _stack()
        if now.address != before.address:
            _put_in(max(now.size, before.size, LEAST))


def _stack(new: _Stack | None = None) -> _Stack:
    """The calling thread's, which a new one follows."""
    found = _Stack()
    if ctypes.CDLL(None, use_errno=True).sigaltstack(new and ctypes.byref(new), ctypes.byref(found)):
        raise OSError(ctypes.get_errno(), "sigaltstack")
    return found


def _put_in(size: int) -> None:
    thread = threading.get_ident()
    if thread not in _stacks or len(_stacks[thread]) < size:
        _stacks[thread] = ctypes.create_string_buffer(size)
    _stack(_Stack(ctypes.addressof(_stacks[thread]), 0, size))
