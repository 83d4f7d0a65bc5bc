"""Interrupts: SIGTERM as Ctrl-C, short stretches that neither can cut in two, and none that is lost on its way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
Handler = Callable[[int, Any], Any]


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
    with _met(lambda *_: False):
        yield


class Gate:
    """open: whether an interrupt may come through; set it, without a call, around what cannot be cut in two.

    raised: what an interrupt that came through raised.
    """

    def __init__(self, opened: bool) -> None:
        self.open = opened
        self.raised: BaseException | None = None

    def through(self, handler: Handler, number: int, frame: Any) -> None:
        """Let an interrupt through, and remember what it raised."""
        try:
            handler(number, frame)
        except BaseException as error:
            self.raised = error
            raise


@contextmanager
def one_interrupt(opened: bool = True) -> Iterator[Gate]:
    """The first interrupt that finds the gate open is raised there and shuts it; others wait for the block's end.

    So what puts things back where an interrupt came is not interrupted itself. The block ends with what was raised,
    as that of `unswallowed`.
    """
    gate = Gate(False)

    def meet(handler: Handler, number: int, frame: Any) -> bool:
        if not gate.open:
            return False
        gate.open = False
        gate.through(handler, number, frame)
        gate.open = True  # it did not raise
        return True

    with _met(meet, gate):
        try:
            gate.open = opened
            yield gate
        finally:
            gate.open = False


@contextmanager
def unswallowed() -> Iterator[None]:
    """An interrupt in this block is raised at its end at the latest, whatever became of it there.

    C++ that calls Python takes one for an error of its own, or drops it: `len()` of a storage is interrupted, and
    PyTorch says that it has no shape.
    """
    gate = Gate(True)

    def meet(handler: Handler, number: int, frame: Any) -> bool:
        gate.through(handler, number, frame)
        return True

    with _met(meet, gate):
        yield


@contextmanager
def _met(meet: Callable[[Handler, int, Any], bool], gate: Gate | None = None) -> Iterator[None]:
    """meet(handler, number, frame) for each interrupt of this block; where it returns False, it waits for the end.

    The block ends with what the gate says was raised, even where something else was made of it.
    """
    if not _in_main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    before = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    ended = False

    def interrupt(number: int, frame: Any) -> None:
        if ended or not meet(before[number], number, frame):
            waiting.append((number, frame))

    try:
        for number in before:
            signal.signal(number, interrupt)
        try:
            yield
        finally:  # an interrupt that comes before this line is done is raised here, and the handlers go back below
            ended = True
    finally:
        ended = True
        for number, handler in before.items():
            signal.signal(number, handler)
        if gate is not None and gate.raised is not None:
            raise gate.raised
        for number, frame in waiting[:1]:
            before[number](number, frame)
