"""Folders of results that a later run replaces whole: a quantized pipeline, a student.

A record in the folder says which files the run wrote. So the next one knows whether anything in it is the user's, and
is refused where it is.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..kernels.runtime.atomic import SUFFIX
from .atomic import replacing_folder
from .claim import is_claim
from .outside import read_json
from .places import check_own, check_writable, lying_in, make_parent

WRITTEN = "files"  # the record's key of `written`
SMALL = 1 << 20  # bytes up to which a file is known by its contents, not by its size alone


@contextmanager
def result_folder(folder: Path, record_name: str, record: dict) -> Iterator[Path]:
    """A new folder to write into; with its record it takes the place of `folder`, which is always whole."""
    with replacing_folder(folder, lambda old: foreign_files(old, record_name)) as new:
        yield new
        (new / record_name).write_text(json.dumps({**record, WRITTEN: written(new)}, indent=1), encoding="utf-8")


def check_replaceable(folder: Path, record: str, verb: str) -> None:
    """Before the long work: a folder that is to be replaced must be new, empty, or as `verb` (a command) left it.

    record: the name of the JSON file in which the earlier run says what it wrote.

    Raises UserError where it is a mount point, cannot be written, or holds what that run did not write.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and the result is a folder; choose another folder.")
    make_parent(folder)
    if os.path.ismount(os.path.realpath(folder)):
        raise UserError(f"{folder} is a mount point, which nothing can replace; choose a folder in it.")
    if not folder.is_dir() or not lying_in(folder):
        return
    check_writable(folder)
    check_own(folder, [record], verb)
    if others := foreign_files(folder, record):
        some = ", ".join(name if name.isprintable() else ascii(name) for name in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{folder} holds what ptq4dm {verb} did not write, or was changed since ({some}{more}); "
            "choose another folder, or move the folder away."
        )


def written(folder: Path) -> dict[str, list[int]]:
    """Relative path -> [bytes, CRC-32 of small files, else 0] of every file under a folder of results."""
    return {name: _known(folder / name) for name in _names(folder)}


def foreign_files(folder: Path, record: str) -> list[str]:
    """What lies under a folder besides `record` and the files that it lists, as they were written; sorted."""
    data = read_json(folder / record, "choose another folder") if (folder / record).is_file() else None
    listed = data.get(WRITTEN) if isinstance(data, dict) else None
    listed = listed if isinstance(listed, dict) else {}
    return [name for name in _names(folder) if name != record and listed.get(name) != _known(folder / name)]


def _names(folder: Path) -> list[str]:
    """The relative paths of all files and links under a folder, and of empty folders.

    Not of what belongs to runs that write there now: hidden folders of files to come, and locks.
    """
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.endswith(SUFFIX)]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        empty = [""] if not folders and not files and Path(place) != folder else []
        files = [name for name in files if not is_claim(name)]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in (*files, *links, *empty)]
    return sorted(Path(name).as_posix() for name in found)


def _known(path: Path) -> list[int]:
    if not path.is_file() or path.is_symlink():
        return [-1, 0]
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= SMALL else 0]
