"""The command as a process of its own: streams whose reader may leave, interrupts, and a clean end.

Nothing here imports PyTorch: it must be in place while that is imported, which takes seconds.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..interrupts import SIGNALS
from ..starting import INTERRUPTED, end
from .failures import FAILED, complain

PIPE_CLOSED = 141  # 128 + SIGPIPE


class Stream(io.FileIO):
    """stdout or stderr. Where nobody reads any more, or the disk is full, what is written is dropped, and it is told.

    So a reader who leaves (`| head -1`) ends no work that is half done.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


def own_stream(stream: Any, fd: int) -> tuple[Any, Stream | None]:
    """Return the text stream to use in the place of Python's, and what is below it; None where there is none."""
    if stream is None:  # closed by who started us: the next file that is opened must not take its number
        return open(os.devnull, "w"), None
    try:
        raw = Stream(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError):  # not a file at all
        return stream, None
    stream.flush()
    made = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",  # a name may hold what the terminal's encoding does not
        line_buffering=raw.isatty() or fd == 2,
    )
    return made, raw


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP. Before the work, they end the process at once: there is nothing to put back.

    In the work the first raises KeyboardInterrupt. The second is passed over, for what it would cut short is the
    clean-up of the first. The third ends the process. After the work they change nothing.
    """

    def __init__(self) -> None:
        self.working, self.came, self.process, self.status = False, 0, os.getpid(), INTERRUPTED

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a child that was forked
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.came += 1
        if not self.working or self.came > 2:
            self._end(number, frame)
        if self.came == 1:
            raise KeyboardInterrupt

    def _end(self, number: int, frame: Any) -> None:
        if self.status == INTERRUPTED:
            end(number, frame)
        os._exit(self.status)

    def install(self) -> None:
        """Take the signals' places; one that is ignored (nohup, a job in the background) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)
        usual = sys.unraisablehook

        def hook(lost: Any) -> None:
            """Python drops an interrupt that comes in a destructor or a callback: it is sent once more."""
            if isinstance(lost.exc_value, KeyboardInterrupt):
                self.came = 0
                again = threading.Timer(0.05, os.kill, (self.process, signal.SIGINT))
                again.daemon = True
                again.start()
            else:
                usual(lost)

        sys.unraisablehook = hook


_interrupts: Interrupts | None = None


@contextmanager
def working() -> Iterator[None]:
    """The block in which a verb works: an interrupt is an exception there, so that what it began is put back."""
    if _interrupts is None:  # called from Python: the process is not ours
        yield
        return
    _interrupts.working = True
    try:
        yield
    finally:
        _interrupts.working = False


def interrupted() -> bool:
    """Whether an interrupt came in the work: then an error may be what some library made of it."""
    return _interrupts is not None and _interrupts.came > 0


def owned(run: Callable[[], int]) -> int:
    """Run the command that this process is for; returns its exit status, that of closed pipes and full disks too."""
    global _interrupts
    _interrupts = Interrupts()
    _interrupts.install()
    sys.stdout, out = own_stream(sys.stdout, 1)
    sys.stderr, _ = own_stream(sys.stderr, 2)
    try:
        status = run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else FAILED
    _flush(sys.stdout)
    if status == 0 and out is not None and out.error is not None:
        status = PIPE_CLOSED if out.error.errno == errno.EPIPE else FAILED
        if status == FAILED:
            complain(f"ptq4dm: cannot write to stdout: {out.error.strerror}.")
    _interrupts.status = status
    return status


def _flush(stream: Any) -> None:
    with suppress(OSError, ValueError):
        stream.flush()
