"""A log of a long run: one JSON object a line, that a resumed run takes up where its checkpoint was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DamagedFile
from .atomic import replacing, told
from .outside import checked_object, outside, parse_json

ADVICE = "bring back the log of the run, or start a new run in another folder"
LINE = {"stage": str}  # what every line has


class Log:
    """A log.jsonl, in the order of the run. Only the main process writes."""

    def __init__(self, path: Path, keep: int, writes: bool, read: Callable[[Path], list[dict]]) -> None:
        """keep: lines of an earlier run that the checkpoint knows of; later ones will come again.

        read: reads the lines of such a file.
        """
        self.path, self.writes, self.lines = path, writes, keep
        if writes:
            old = [json.dumps(line) + "\n" for line in read(path)[:keep]] if keep else []
            if len(old) < keep:
                raise DamagedFile(
                    f"{path} has only {len(old)} of the {keep} lines that the checkpoint knows; {ADVICE}."
                )
            with replacing(path) as temporary:
                temporary.write_text("".join(old))

    def write(self, **entry: Any) -> None:
        self.lines += 1
        if self.writes:
            with told(self.path), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")


def read_lines(path: str | Path, check: Callable[[dict], None] = lambda line: None) -> list[dict]:
    """The lines of a log; half a line at its end, of a run that was killed, does not count.

    check: raises ValueError for a line that no run wrote. Raises DamagedFile.
    """
    with outside(path, ADVICE):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        found = [checked_object(parse_json(line), LINE) for line in lines[:-1]]
        for line in found:
            check(line)
        return found
