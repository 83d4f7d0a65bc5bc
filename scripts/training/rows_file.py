"""Rows of an experiment: lines of JSON in a file that several processes write, each line whole."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "comparisons"))
from conditions import commit  # noqa: E402

from ptq4dm.files.outside import parse_json  # noqa: E402


def read_rows(path: Path) -> list[dict]:
    """The rows that are there; half a line, of a process that was killed, does not count."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [parse_json(line) for line in lines if line.startswith("{") and line.endswith("}")]


def facts_of(device: torch.device) -> dict:
    """Card, version, commit and day that figures are of."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"card": card, "torch": torch.__version__, "commit": commit(), "when": time.strftime("%Y-%m-%d")}


class RowsFile:
    """Rows are added at the end of a file; `has` looks at those of other processes, too."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.facts = path, facts_of(device)
        path.parent.mkdir(parents=True, exist_ok=True)

    def has(self, **key) -> bool:
        """Whether there is a row with all of these."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(self.path))

    def add(self, **row) -> None:
        """Write a row with the facts after it, and print it."""
        line = json.dumps({**row, **self.facts})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
