"""The embedded models and statistics, read through one function; and which names are no model at all."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from ..errors import UserError, meant

EMBEDDED = ("unet-cifar10", "dit-cifar10", "unet-cifar10-onestep", "flow-dit-cifar10")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # owner/name


def folder_of(model: str | os.PathLike) -> Path:
    """The local folder that a name or a path stands for, whether it exists or not."""
    return asset_path(os.fspath(model)) if os.fspath(model) in EMBEDDED else Path(model).expanduser()


def check_name(model: str | os.PathLike) -> None:
    """Raises UserError for what is neither an embedded model, nor a folder here, nor could be a hub's id.

    What begins as a folder does that is here is a path: the hub is not asked for `out/w8` where `out` has no `w8`.
    """
    name = os.fspath(model)
    if folder_of(model).is_dir():
        return
    if not (isinstance(model, str) and HUB_ID.fullmatch(name)):
        raise UserError(
            f"'{name}' is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder here, "
            f"nor a hub id (owner/name){meant(name, EMBEDDED) or '.'}"
        )
    owner, _, rest = name.partition("/")
    if os.path.isdir(owner):
        raise UserError(
            f"there is a folder '{owner}' here, and no folder '{rest}' in it; to ask the hub for {name}, run this in "
            "another folder."
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
