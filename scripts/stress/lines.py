"""Results as JSON lines, added to as they come, so that an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path

from ptq4dm.errors import UserError
from ptq4dm.files.atomic import replacing


class Lines(list):
    """The lines (dicts) of the file `path`; half a line at its end, of a run that was stopped, is left out.

    settings: what decides the results; it is in each line. Raises UserError where the file has lines of others.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        super().__init__()
        self.path, self.settings = path, json.loads(json.dumps(settings))
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                self.append(json.loads(line))
        for one in self:
            if other := [k for k, v in self.settings.items() if one.get(k) != v]:
                raise UserError(f"{path} was made with another {other[0]}; give another --output, or delete it.")
        if text and not text.endswith("\n"):
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(one) + "\n" for one in self))

    def add(self, line: dict) -> None:
        self.append({**self.settings, **line})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(self[-1]) + "\n")
