"""What scripts share whose tables take hours: parts of the rows for several machines, chosen rows, an end in time."""

from __future__ import annotations

import fnmatch
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq4dm.errors import UserError


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", 0 <= i < n."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard is i/n with i from 0 to n - 1, such as 0/4; got '{text}'.")
    return int(index), int(count)


def named(rows: Sequence[Any], patterns: Sequence[str]) -> list[Any]:
    """The rows whose `name` fits one of the patterns; UserError for a pattern that fits none."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            raise UserError(f"no row is called '{pattern}'; there are: {'; '.join(row.name for row in rows)}.")
    return [row for row in rows if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns)]


def add_options(parser, stores: bool = True) -> None:
    """The options of a table that takes long: --minutes, --workers, --shard; --stores if calibrations are kept."""
    parser.add_argument("--minutes", type=float, help="begin no row that would end after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the rows, on GPUs in turn")
    parser.add_argument(
        "--shard", default="0/1", help="i/n: every n-th row from the i-th, with an --output of its own"
    )
    if stores:
        parser.add_argument(
            "--stores", type=Path, help="folder of calibration stores; left out, one beside the output"
        )


class Deadline:
    """Whether there is time for one more row, judged by the longest so far, of all processes that are given it.

    Where rows are known to differ, by `work`: a row of twice the work is thought to take twice as long.
    """

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.time() + 60 * minutes  # a clock that processes share
        self.longest = multiprocessing.get_context("spawn").Value("d", 0.0)  # seconds for a unit of work

    def passed(self, work: float = 1.0) -> bool:
        return self.end is not None and time.time() + self.longest.value * work > self.end

    def took(self, seconds: float, work: float = 1.0) -> None:
        with self.longest.get_lock():
            self.longest.value = max(self.longest.value, seconds / work)
