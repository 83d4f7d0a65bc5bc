"""The embedded models and statistics, read through one function."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UserError


def asset_path(name: str) -> Path:
    """The path of an embedded file or folder, in a checkout (`assets/` at the top) and in an installed wheel.

    Raises:
        UserError: nothing of that name is embedded.
    """
    package = sys.modules[__name__.partition(".")[0]]  # in a checkout its path has two folders
    roots = [Path(p) / "assets" for p in package.__path__]
    for root in roots:
        if (root / name).exists():
            return root / name
    raise UserError(f"no embedded asset is called '{name}'; looked in {', '.join(map(str, roots))}.")
