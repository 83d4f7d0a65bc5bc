"""What a long comparison has found so far, in a file beside its output: an interrupted one goes on with the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptq4dm.files.rows import Rows


class Kept:
    """Values by name, each written as it is found. Raises UserError where the file is of other settings."""

    def __init__(self, path: Path, settings: dict):
        self.rows = Rows(path, settings, {"name": str})
        self.values = {row["name"]: row["value"] for row in self.rows}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of that name, made now where there is none. It is of what JSON holds."""
        if name not in self.values:
            self.values[name] = make()
            self.rows.add({"name": name, "value": self.values[name]})
        return self.values[name]
