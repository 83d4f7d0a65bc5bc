"""The rows of a long measurement in a JSON file: written after each, so that an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import replacing


class Rows(list):
    """The rows (dicts) of the file `path`, none if it is new; `add` appends one and writes the file.

    Args:
        settings: all that decides the figures besides the row.
        also: what else the file is to hold, by name.

    Raises:
        UserError: the file was made with other settings.
    """

    def __init__(self, path: Path, settings: dict, **also: Any) -> None:
        super().__init__()
        self.path, self.settings, self.also = Path(path), settings, also
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if before["settings"] != settings:
                raise UserError(f"{path} was made with other settings ({before['settings']}); give another --output.")
            self.extend(before["rows"])

    def add(self, row: dict) -> None:
        self.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "rows": list(self), **self.also}, indent=1))
