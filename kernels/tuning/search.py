"""Find the settings that a kernel runs fastest with on this GPU: try each, time it, and record the best.

    tried       compiled and run once, in several processes at once; Triton keeps what they compile on disk
    timed       here, alone on the GPU, by CUDA graphs on operands that no cache holds
    raced       the fastest few and what is used today, taking turns
    recorded    in the file of this GPU (settings.py), at once: a search that is cut short has been of use

Settings that do not compile, do not fit or crash are left out, and told. What is searched are launches: of an
SVDQuant layer (launches_w4.py) or a W8A8 one (launches_w8a8.py).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..runtime.settings import record
from . import stopwatch
from .workers import Workers, first_line

ROOM = 2 << 30  # bytes of GPU memory for each process: a CUDA context and one set of operands
PER_PROCESS = 8  # settings for each process before those that compile are timed
FINALISTS = 3


class Tunable(Protocol):
    """One launch of one shape, whose settings are searched; frozen and picklable."""

    kernel: str  # its name in the file of settings
    key: list[int] | str  # sizes [M, N, K], or a shape class

    def settings(self) -> list[dict]:
        """To be tried."""

    def current(self) -> dict | None:
        """Settings that it runs with today; None where nothing is known."""

    def compiled_as(self, setting: dict) -> Hashable:
        """The same for launches that compile to the same: one of them is tried."""

    def attempt(self, setting: dict) -> None:
        """Run it once."""

    def calls(self) -> Callable[[dict], list[Callable]]:
        """Setting -> calls for the stopwatch, on operands that are made once."""


@dataclass
class Found:
    """Result for one launch: (microseconds, setting), the fastest first; (reason, setting) of those left out."""

    launch: Tunable
    times: list[tuple[float, dict]]
    left_out: list[tuple[str, dict]] = field(default_factory=list)
    before: float | None = None  # microseconds with what was used until now

    @property
    def name(self) -> str:
        key = self.launch.key
        return f"{self.launch.kernel} {key if isinstance(key, str) else ','.join(map(str, key))}"


def candidates(launch: Tunable) -> list[dict]:
    """Its settings, what it runs with today among them: a search never makes a kernel slower."""
    current = launch.current()
    settings = launch.settings()
    return settings if current is None or current in settings else [*settings, current]


def default_workers() -> int:
    """As many processes as cores, up to 12, and as GPU memory has room for."""
    return max(1, min(12, os.cpu_count() or 1, torch.cuda.mem_get_info()[0] // ROOM))


def search(
    launches: list[Tunable],
    path: Path,
    workers: int,
    seconds: float | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Found]:
    """Search settings for each launch; its best is in `path` before it is yielded.

    seconds: launches that are not begun by then are left as they are.
    tick: called once for each setting of each launch, when it is done with.
    """
    began = time.monotonic()
    problems: dict[Hashable, str | None] = {}
    with Workers(attempt, workers) as pool:
        work = [(launch, candidates(launch), launch.current()) for launch in launches]
        for group in groups(work, PER_PROCESS * workers):
            if seconds is not None and time.monotonic() - began > seconds:
                return
            jobs: dict[Hashable, tuple] = {}
            for launch, settings, _ in group:
                for setting in settings:
                    if launch.compiled_as(setting) not in problems:
                        job = (torch.cuda.current_device(), launch, setting)
                        jobs.setdefault(launch.compiled_as(setting), job)
            new = list(jobs)
            for place, problem in pool.answers(jobs.values()):
                problems[new[place]] = problem
            for launch, settings, current in group:
                if seconds is not None and time.monotonic() - began > seconds:
                    return
                good, left_out = [], []
                for setting in settings:
                    problem = problems[launch.compiled_as(setting)]
                    good += [setting] if problem is None else []
                    left_out += [] if problem is None else [(problem, setting)]
                    if problem is not None:
                        tick()
                found = timed(launch, good, current, tick)
                found.left_out = left_out + found.left_out
                if found.times:
                    record(launch.kernel, launch.key, found.times[0][1], path)
                yield found


def groups(work: list[tuple[Tunable, list[dict], dict | None]], least: int) -> Iterator[list]:
    """Consecutive launches with at least so many settings together, so that no process waits for another's end."""
    group: list = []
    for one in work:
        group.append(one)
        if sum(len(settings) for _, settings, _ in group) >= least:
            yield group
            group = []
    if group:
        yield group


def timed(launch: Tunable, settings: list[dict], current: dict | None, tick: Callable[[], None]) -> Found:
    """Time each setting; then once more the fastest, and what is used today, in turns."""
    found = Found(launch, [])
    if not settings:
        return found
    try:
        calls = launch.calls()
    except torch.OutOfMemoryError as problem:
        found.left_out += [(first_line(problem), setting) for setting in settings]
        return found
    for setting in settings:
        try:
            found.times.append((stopwatch.microseconds(calls(setting), 5), setting))
        except Exception as problem:  # ran on little, but not on this much
            torch.cuda.synchronize()  # raises where the GPU can no longer be used
            found.left_out.append((first_line(problem), setting))
        tick()
    found.times.sort(key=lambda pair: pair[0])
    ran = [setting for _, setting in found.times]
    finalists = ran[:FINALISTS] + [setting for setting in ran[FINALISTS:] if setting == current]
    if finalists:
        times = stopwatch.race({json.dumps(setting): calls(setting) for setting in finalists})
        raced = sorted(((times[json.dumps(setting)], setting) for setting in finalists), key=lambda pair: pair[0])
        found.times = raced + [pair for pair in found.times if pair[1] not in finalists]
        found.before = next((spent for spent, setting in raced if setting == current), None)
    return found


def attempt(job: tuple[int, Tunable, dict]) -> str | None:
    """In a process of its own: run a launch once. What went wrong, or None.

    Raises where the GPU can no longer be used by this process.
    """
    device, launch, setting = job
    torch.cuda.set_device(device)
    try:
        launch.attempt(setting)
        torch.cuda.synchronize()
    except Exception as problem:
        reason = first_line(problem)
        try:
            torch.cuda.synchronize()
        except Exception:
            raise problem from None
        return reason
    return None
