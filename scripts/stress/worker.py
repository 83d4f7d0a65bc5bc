"""Inputs in a process of their own: one that hangs or dies is told, and the next process goes on behind it."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stress.judge import SLOW, Result, Subject, drawn, judged

MEMORY = 4 << 30  # bytes that a loader may take beyond what there is


def results(numbers: Sequence[int], seed: int, subjects: dict[str, Subject], outside: Path) -> Iterator[Result]:
    """The result of each input, in order."""
    numbers = list(numbers)
    while numbers:
        for result in _until_death(numbers, lambda n: _one(n, seed, subjects, outside), subjects):
            if not result.kind:  # it died, and cannot say of what
                subject, change, path = drawn(seed, result.number, subjects, outside)
                result.kind, result.change, result.file = subject.kind.name, change.name, path
            numbers.remove(result.number)
            yield result


def _one(number: int, seed: int, subjects: dict[str, Subject], outside: Path) -> Result:
    return judged(number, *drawn(seed, number, subjects, outside), outside)


def _until_death(numbers: list[int], one: Callable[[int], Result], subjects: dict[str, Subject]) -> Iterator[Result]:
    """Fork a process for some inputs; ends with all of them, or with the one that it died of."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _child(list(numbers), one, subjects, writing)
    os.close(writing)
    pending, rest = list(numbers), b""
    try:
        while pending:
            ready, _, _ = select.select([reading], [], [], 2 * SLOW)
            data = os.read(reading, 1 << 16) if ready else b""
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                pending.pop(0)
                yield Result(**json.loads(line))
        if pending:
            outcome, detail = ("slow", "") if not ready else ("crash", "")
            if not ready:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            child = 0
            if outcome == "crash":
                detail = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status >> 8}"
            yield Result(pending[0], "", "", "", outcome, detail)
    finally:
        os.close(reading)
        if child:
            if pending:
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _child(numbers: list[int], one: Callable[[int], Result], subjects: dict[str, Subject], out: int) -> None:
    """The process: never returns."""
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        limit_memory()
        for subject in subjects.values():
            subject.place.restore()
        for number in numbers:
            os.write(out, json.dumps(one(number).to_dict()).encode() + b"\n")
        os._exit(0)
    finally:
        os._exit(1)


def limit_memory() -> None:
    """So that a number of a million digits cannot take the machine's memory."""
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        pass  # no Linux
