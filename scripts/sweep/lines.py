"""The rows of the sweep: a file of JSON lines, added to after each cell, so that an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptq4dm.errors import DamagedFile
from ptq4dm.files.atomic import replacing, told
from ptq4dm.files.outside import checked_object, outside, parse_json
from ptq4dm.files.places import make_parent

KEY = ("kind", "class", "variant", "column")
CONDITIONS = ("commit", "versions", "seed", "backend")


class Lines:
    """The newest row of each key of the file `path`, none if it is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple, dict[str, Any]] = {}
        self.torn = False  # the last line is half a line, of a run that was stopped
        advice = "give another --output"
        with outside(path, advice):
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = checked_object(parse_json(line), dict.fromkeys(KEY, str))
                self.rows[tuple(row[name] for name in KEY)] = row
            except (ValueError, RecursionError):
                self.torn = number == len(lines)
                if not self.torn:
                    raise DamagedFile(f"line {number} of {path} is no row of the sweep; {advice}.") from None

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether there is a row of this key that was made under the same conditions."""
        old = self.rows.get(tuple(row[name] for name in KEY))
        return old is not None and all(old.get(name) == row[name] for name in CONDITIONS)

    def add(self, row: dict[str, Any]) -> None:
        self.rows[tuple(row[name] for name in KEY)] = row
        make_parent(self.path)
        if self.torn:
            self.tidy()
        with told(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def tidy(self) -> None:
        """Write the file anew with the newest row of each key, in order."""
        self.torn = False
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(self.rows[key]) + "\n" for key in sorted(self.rows)))
