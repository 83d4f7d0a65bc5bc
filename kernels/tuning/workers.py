"""Processes that try things which may fail, crash or hang: each job gets an answer, and the others go on.

A pool of the standard library is lost with the first process that dies, and waits for ever for one that hangs; a
kernel whose settings do not suit a GPU does both.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait

READY = "ready"
START = 600.0  # seconds until a new process must be ready


class Workers:
    """`count` processes that answer function(job): a string, or None where all is well. Leave by `with`.

    function: importable by name. It answers what may go wrong; where it raises, the exception's name is the answer,
        and the process is not used again: nobody knows what state it is in.
    limit: seconds that a job may take.
    """

    def __init__(self, function: Callable, count: int, limit: float = 300.0):
        self.function, self.count, self.limit = function, count, limit
        self.idle: list[tuple] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        for process, pipe in self.idle:
            _end(process, pipe)
        self.idle = []

    def answers(self, jobs: Iterable) -> Iterator[tuple[int, str | None]]:
        """(place of the job, its answer), as they come. Raises RuntimeError where processes do not start."""
        waiting = deque(enumerate(jobs))
        busy: dict = {}  # pipe -> (process, place of its job, until when)
        fresh: set = set()  # pipes of processes that are not ready yet
        try:
            while waiting or busy:
                while waiting and len(busy) < self.count:
                    place, job = waiting.popleft()
                    new = not self.idle
                    process, pipe = self._start() if new else self.idle.pop()
                    busy[pipe] = process, place, time.monotonic() + (START if new else self.limit)
                    fresh.update([pipe] * new)
                    with suppress(OSError):  # it is gone: told below, where nothing comes back
                        pipe.send(job)
                ready = wait(list(busy), timeout=1.0)
                for pipe in list(busy):
                    process, place, until = busy[pipe]
                    if pipe not in ready and time.monotonic() < until:
                        continue
                    try:
                        message = pipe.recv() if pipe in ready else (f"took over {self.limit:.0f} s", False)
                    except (EOFError, OSError):
                        process.join(5)
                        message = f"its process died (exit status {process.exitcode})", False
                    if message == READY:
                        fresh.remove(pipe)
                        busy[pipe] = process, place, time.monotonic() + self.limit
                        continue
                    answer, usable = message
                    if pipe in fresh:
                        raise RuntimeError(f"a process to try settings in does not start: {answer}.")
                    del busy[pipe]
                    if usable:
                        self.idle.append((process, pipe))
                    else:
                        _end(process, pipe)
                    yield place, answer
        finally:
            for pipe, (process, _, _) in busy.items():
                _end(process, pipe)

    def _start(self) -> tuple:
        context = get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.function, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _end(process, pipe) -> None:
    pipe.close()
    process.kill()
    process.join()


def _serve(function: Callable, pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it is told, and ends it
    pipe.send(READY)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer, usable = function(job), True
        except BaseException as error:
            answer, usable = first_line(error), False
        pipe.send((answer, usable))
        if not usable:
            os._exit(1)  # at once: a broken CUDA context may not let an orderly exit end


def first_line(error: BaseException) -> str:
    """The exception's name and what it says first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
