"""What scripts share whose tables take hours: parts of the rows for several machines, and an end in time."""

from __future__ import annotations

import time

from ptq4dm.errors import UserError


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", 0 <= i < n."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard is i/n with i from 0 to n - 1, such as 0/4; got '{text}'.")
    return int(index), int(count)


class Deadline:
    """Whether there is time for one more row, judged by the longest so far.

    Where rows are known to differ, by `work`: a row of twice the work is thought to take twice as long.
    """

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.perf_counter() + 60 * minutes
        self.longest = 0.0  # seconds for a unit of work

    def passed(self, work: float = 1.0) -> bool:
        return self.end is not None and time.perf_counter() + self.longest * work > self.end

    def took(self, seconds: float, work: float = 1.0) -> None:
        self.longest = max(self.longest, seconds / work)
