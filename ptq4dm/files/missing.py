"""Whether a folder is there at all, looked at without any library: before long imports, and again with the rest."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError

STORE = "store.json"


def check_store(folder: str | os.PathLike) -> None:
    """Raises UserError where a folder is no calibration store."""
    if not (Path(folder) / STORE).is_file():
        raise UserError(f"{folder} is not a calibration store (no {STORE}); make one with `ptq4dm collect`.")
