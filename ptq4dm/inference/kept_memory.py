"""Memory that a forward pass on a CPU leaves kept for the next one, by glibc's own settings (mallopt(3)).

A step allocates and frees tens of MiB, several times a layer. As glibc is set it gives what lies on top back to the
system, and takes large pieces from it anew: each page is then cleared and mapped again. While somebody keeps memory,
pieces of up to 32 MiB come from the heap, and a GiB of it stays.
"""

from __future__ import annotations

import ctypes
import platform
import threading

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h
PLAIN = {TRIM_THRESHOLD: 128 << 10, MMAP_THRESHOLD: 128 << 10}  # what glibc starts with
KEPT = {TRIM_THRESHOLD: 1 << 30, MMAP_THRESHOLD: 32 << 20}  # the most that a piece of a heap can be

_guard = threading.Lock()
_users = 0


def can_keep() -> bool:
    """Whether this process allocates by glibc."""
    return platform.libc_ver()[0] == "glibc"


def keep() -> None:
    """Keep memory from now on, until `release` was called as often."""
    global _users
    with _guard:
        _users += 1
        if _users == 1:
            _set(KEPT)


def release() -> None:
    """Give back what is free, and keep no more, when the last has released it."""
    global _users
    with _guard:
        _users -= 1
        if not _users:
            _set(PLAIN)
            ctypes.CDLL(None).malloc_trim(0)


def _set(values: dict[int, int]) -> None:
    for name, value in values.items():
        ctypes.CDLL(None).mallopt(name, value)
