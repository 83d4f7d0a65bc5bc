"""Loading beside other threads' work.

While diffusers and transformers build a model, the default dtype of the whole process is the model's, and parameters
of all new modules lie on "meta". So one thread loads at a time, and none makes layers, or runs a network, meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Doors(threading.local):
    """How often this thread is inside."""

    loading = 0
    working = 0


_inside = _Doors()
_changed = threading.Condition()
_loader: int | None = None  # the thread that loads
_workers = 0


@contextmanager
def loading() -> Iterator[None]:
    """Alone in the process; waits for others' work. A thread that is at work itself does not wait, for it would for
    ever."""
    global _loader
    here = threading.get_ident()
    if _inside.loading:
        yield
        return
    with _changed:
        while _loader is not None or (_workers and not _inside.working):
            _changed.wait()
        _loader = here
    _inside.loading += 1
    try:
        yield
    finally:
        _inside.loading -= 1
        with _changed:
            _loader = None
            _changed.notify_all()


@contextmanager
def not_while_loading() -> Iterator[None]:
    """Beside others' work, but not while another thread loads a model."""
    global _workers
    if _inside.loading or _inside.working:
        yield
        return
    with _changed:
        while _loader is not None:
            _changed.wait()
        _workers += 1
    _inside.working += 1
    try:
        yield
    finally:
        _inside.working -= 1
        with _changed:
            _workers -= 1
            _changed.notify_all()
