"""Files and folders of results: a file is always whole, and a failure leaves no empty folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from ..kernels.runtime import atomic


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` at the end and removed where anything fails.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with atomic.replacing(path) as temporary:  # safetensors puts a file of its own there
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}.") from error


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside, to write into; at the end it takes the place of `folder`: always whole, old or new.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            new, old = Path(beside) / "new", Path(beside) / "old"
            new.mkdir()
            yield new
            for path in new.rglob("*.safetensors"):  # which safetensors writes for their owner alone
                path.chmod(0o666 & new.stat().st_mode)
            try:
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
            except BaseException:  # an interrupt, too: the old one comes back
                if old.exists() and not folder.exists():
                    old.rename(folder)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}.") from error


@contextmanager
def output_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make the folder for results before the long work starts; where that fails, take it away again.

    Raises:
        UserError: it is a file, or cannot be made.
    """
    path = Path(path)
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}.") from error
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # rmdir refuses a folder in which something is by now
            for folder in made:
                folder.rmdir()
        raise
