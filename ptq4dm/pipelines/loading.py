"""Loading beside other threads' work.

While diffusers and transformers build a model, the default dtype of the whole process is the model's, and parameters
of all new modules lie on "meta". So one thread loads at a time, and none makes layers, or runs a network, meanwhile.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK = 0.05  # seconds between two looks at whether others are done


class _Entry:
    """Somebody inside, for as long as the entry lives: also one who was interrupted on the way out leaves."""

    def __init__(self, load: bool) -> None:
        self.load, self.thread = load, threading.get_ident()


_entries: weakref.WeakSet[_Entry] = weakref.WeakSet()
_changed = threading.Condition()


@contextmanager
def loading() -> Iterator[None]:
    """Alone in the process; waits for others' work. A thread that is at work itself does not wait for the work of
    others: they may wait for it."""
    entry = _Entry(load=True)
    _enter(entry, lambda own, others: any(one.load for one in others) or bool(others and not own))
    try:
        yield
    finally:
        _leave(entry)


@contextmanager
def not_while_loading() -> Iterator[None]:
    """Beside others' work, but not while another thread loads a model."""
    entry = _Entry(load=False)
    _enter(entry, lambda own, others: any(one.load for one in others) and not own)
    try:
        yield
    finally:
        _leave(entry)


def _enter(entry: _Entry, must_wait: Callable[[list[_Entry], list[_Entry]], bool]) -> None:
    def waits() -> bool:
        own = [one for one in _entries if one.thread == entry.thread]
        return must_wait(own, [one for one in _entries if one.thread != entry.thread])

    with _changed:
        while waits():
            _changed.wait(LOOK)
        _entries.add(entry)


def _leave(entry: _Entry) -> None:
    with _changed:
        _entries.discard(entry)
        _changed.notify_all()
