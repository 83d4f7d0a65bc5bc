"""A change of a few files, and a folder that it is put into and taken out of again."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

REMOVED, FOLDER, PIPE = object(), object(), object()  # what may be in a file's place


@dataclass(frozen=True)
class Link:
    """A symbolic link in a file's place."""

    to: str


@dataclass
class Change:
    """What is done to files.

    name: family and kind, "bytes cut". files: relative path -> new bytes, or one of the things above.
    formed: the file is well-formed on purpose: it may be a legitimate other file.
    hostile: whatever it brings in must not be loaded.
    """

    name: str
    files: dict[str, object]
    formed: bool = False
    hostile: bool = False


@dataclass
class Case:
    """What a change is made of: dice, the files of a kind, the path that is to change, files of other kinds.

    outside: a folder beside, in which `secret.safetensors` must not be read and `canary` must not appear.
    """

    dice: Random
    files: dict[str, bytes]
    path: str
    donors: list[bytes]
    outside: Path

    @property
    def data(self) -> bytes:
        return self.files[self.path]

    def changed(self, name: str, data: bytes, formed: bool = False) -> Change:
        return Change(name, {self.path: data}, formed)


class Place:
    """A folder with the files of a kind; `changed` is a folder with a change in it, `restored` as it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def put(self, change: Change) -> None:
        for name, new in change.files.items():
            path = self.folder / name
            _remove(path)
            if new is REMOVED:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if new is FOLDER:
                path.mkdir()
            elif new is PIPE:
                os.mkfifo(path)
            elif isinstance(new, Link):
                path.symlink_to(new.to)
            else:
                path.write_bytes(new)

    def restore(self) -> None:
        """Take away whatever is not as it was."""
        found = set()
        for place, folders, files in os.walk(os.fsencode(self.folder)):
            for name in [*files, *(one for one in folders if os.path.islink(os.path.join(place, one)))]:
                path = os.fsdecode(os.path.join(place, name))
                relative = os.path.relpath(path, self.folder)
                if not self._as_it_was(path, relative):
                    _remove(Path(path))
                else:
                    found.add(relative)
        for name in self.files.keys() - found:
            path = self.folder / name
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])
        for place, folders, files in os.walk(os.fsencode(self.folder), topdown=False):
            if not folders and not files and place != os.fsencode(self.folder):
                os.rmdir(place)

    def _as_it_was(self, path: str, relative: str) -> bool:
        if relative not in self.files or os.path.islink(path) or not os.path.isfile(path):
            return False
        before = self.files[relative]
        if os.path.getsize(path) != len(before):
            return False
        with open(path, "rb") as file:
            return file.read() == before


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
