"""The rows of a long measurement in a JSON file: written after each, so that an interrupted run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import replacing
from .outside import checked_object, outside, read_object
from .places import make_parent

Kind = type | tuple[type, ...]
NONE: dict[str, Kind] = {}


class Rows(list):
    """The rows (dicts) of the file `path`, none if it is new; `add` appends one and writes the file.

    Args:
        settings: all that decides the figures besides the row.
        kinds: what every row has, by name, and of what type it is.
        also: what else the file is to hold, by name.

    Raises:
        UserError: the file was made with other settings.
        DamagedFile: it is no file of rows.
    """

    def __init__(self, path: Path, settings: dict, kinds: Mapping[str, Kind] = NONE, **also: Any) -> None:
        super().__init__()
        self.path, self.settings, self.also = Path(path), settings, also
        if self.path.exists():
            advice = "give another --output, or delete it"
            before = read_object(self.path, {"settings": dict, "rows": list}, advice)
            with outside(self.path, advice):
                for row in before["rows"]:
                    _check(row, kinds)
            if before["settings"] != settings:
                raise UserError(f"{path} was made with other settings ({before['settings']}); give another --output.")
            self.extend(before["rows"])

    def add(self, row: dict) -> None:
        self.append(row)
        text = json.dumps({"settings": self.settings, "rows": list(self), **self.also}, indent=1)
        try:
            make_parent(self.path)
            with replacing(self.path) as temporary:
                temporary.write_text(text)
        except UserError:
            print(json.dumps(row), flush=True)  # measured is measured, whatever the disk says
            raise


def _check(row: Any, kinds: Mapping[str, Kind]) -> None:
    checked_object(row, kinds)
    for name in kinds:
        if isinstance(row[name], float) and not math.isfinite(row[name]):
            raise ValueError(f"a row's '{name}' is {row[name]}")
