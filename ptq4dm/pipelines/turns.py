"""Turns: one thread at a time uses a network, a scheduler or a pipeline; others wait.

A pipeline keeps what it is doing in itself, its schedulers (which step) and its networks (hooks, the mode they are
in), so two threads in one of these would change each other's pictures. Threads that share none do not wait.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

Lock = Any  # threading.RLock is a function

_locks: dict[int, tuple[int, Lock]] = {}  # by the id of the object: the order in which locks are taken, and the lock
_numbers = count()
_guard = threading.Lock()


@contextmanager
def turns(objects: Iterable[Any]) -> Iterator[None]:
    """The turn of this thread at these objects; it may have some of them already.

    All threads take turns in one order, so that none waits for another that waits for it.
    """
    locks = {id(one): _lock_of(one) for one in (getattr(one, "_orig_mod", one) for one in objects)}
    with ExitStack() as stack:
        for _, lock in sorted(locks.values(), key=lambda found: found[0]):
            stack.enter_context(lock)
        yield


def _lock_of(one: Any) -> tuple[int, Lock]:
    with _guard:
        if id(one) not in _locks:
            weakref.finalize(one, _locks.pop, id(one), None).atexit = False
            _locks[id(one)] = next(_numbers), threading.RLock()
        return _locks[id(one)]
