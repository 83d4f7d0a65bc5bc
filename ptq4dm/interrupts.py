"""Interrupts: SIGTERM as Ctrl-C, and short stretches that neither can cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # others get no signals, and may set no handlers


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt in this block, as Ctrl-C does; ignored ones (nohup) stay ignored."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    found = {n: signal.getsignal(n) for n in SIGNALS if n is not signal.SIGINT} if _in_main_thread() else {}
    taken = {number: before for number, before in found.items() if before is signal.SIG_DFL}
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off interrupts until the end of this block, which must be short: a model is changed whole or not at all."""
    if not _in_main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            before[number](number, frame)


class Gate:
    """open: whether an interrupt may come through; set it, without a call, around what cannot be cut in two."""

    def __init__(self, opened: bool) -> None:
        self.open = opened


@contextmanager
def one_interrupt(opened: bool = True) -> Iterator[Gate]:
    """The first interrupt that finds the gate open is raised there and shuts it; others wait for the block's end.

    So what puts things back where an interrupt came is not interrupted itself.
    """
    gate = Gate(False)
    if not _in_main_thread():
        yield gate
        return
    waiting: list[tuple[int, Any]] = []
    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}

    def interrupt(number: int, frame: Any) -> None:
        if not gate.open:
            waiting.append((number, frame))
            return
        gate.open = False
        before[number](number, frame)
        gate.open = True  # it did not raise

    try:
        for number in before:
            signal.signal(number, interrupt)
        gate.open = opened
        yield gate
    finally:
        gate.open = False
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in waiting[:1]:
            before[number](number, frame)
