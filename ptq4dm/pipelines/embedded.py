"""The embedded models and statistics, read through one function; and which names are no model at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import UserError, meant

EMBEDDED = ("unet-cifar10", "dit-cifar10", "unet-cifar10-onestep", "flow-dit-cifar10")


def folder_of(model: str | os.PathLike) -> Path:
    """The local folder that a name or a path stands for, whether it exists or not."""
    return asset_path(os.fspath(model)) if os.fspath(model) in EMBEDDED else Path(model).expanduser()


def check_name(model: str | os.PathLike) -> None:
    """Raises UserError for what is neither an embedded model, nor a folder here, nor could be a hub's id."""
    name = os.fspath(model)
    of_a_hub = isinstance(model, str) and not name.startswith((".", "/", "~")) and name.count("/") == 1
    if not (of_a_hub or folder_of(model).is_dir()):
        raise UserError(
            f"'{name}' is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder here, "
            f"nor a hub id (owner/name){meant(name, EMBEDDED) or '.'}"
        )


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
