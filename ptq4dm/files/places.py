"""Places for results, looked at before the long work: can they be written, and is there room."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from ..errors import UserError
from ..kernels.runtime.atomic import SUFFIX, sweep
from .claim import is_claim, sweep_claims

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = frozenset((
    ".bin", ".bmp", ".ckpt", ".csv", ".gguf", ".gif", ".htm", ".html", ".jpeg", ".jpg", ".json", ".jsonl", ".md",
    ".npy", ".npz", ".onnx", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".py", ".safetensors", ".svg", ".tar",
    ".tif", ".tiff", ".toml", ".txt", ".webp", ".xml", ".yaml", ".yml", ".zip",
))  # fmt: skip
"""Ends of names that say what a file holds."""
INDEX = "model_index.json"  # of a pipeline, which is no place for other results


@contextmanager
def output_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make the folder for results before the long work starts; where that fails, take it away again.

    What dead processes left in it half-written is taken away.

    Raises:
        UserError: it is a file or the folder of a pipeline, cannot be made, or cannot be written into.
    """
    path = Path(path)
    check_link(path)
    if (path / INDEX).is_file():
        raise UserError(f"{path} is the folder of a model, and no other results go into it; choose another --output.")
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot make the folder {path}: it is a file; give another name.")
    with empty_taken_back():
        try:
            _make(Path(os.path.realpath(path)))  # a link may lead to a folder that is new
        except OSError as error:
            raise UserError(f"cannot make the folder {path}: {error.strerror or error}.") from error
        check_writable(path)
        yield path


_made: ContextVar[list[Path] | None] = ContextVar("made", default=None)


@contextmanager
def empty_taken_back() -> Iterator[None]:
    """Where this fails, folders that `make_parent` or `output_folder` made go again if they are empty."""
    made: list[Path] = []
    before = _made.set(made)
    try:
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # rmdir refuses a folder in which something is by now
                folder.rmdir()
        raise
    finally:
        _made.reset(before)


def _make(folder: Path) -> None:
    made = _made.get()
    if made is not None:
        made += [one for one in reversed((folder, *folder.parents)) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)


def make_parent(path: str | os.PathLike) -> None:
    """Make the folder that a result goes into, before the long work.

    Raises UserError where it cannot be made or written into, or a device or a pipe is in the result's place.
    """
    check_link(path)
    real = Path(os.path.realpath(path))
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise UserError(f"cannot write {path}: it is no plain file; give another name.")
    try:
        _make(real.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give another place.") from None
    check_writable(real.parent)


def check_link(path: str | os.PathLike) -> None:
    """Raises UserError for a link that leads in a circle; one that leads to nothing yet is fine."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"cannot write {path}: it is a link that leads back to itself.") from None


def file_place(path: str | os.PathLike, ends: str, begins: bytes = b"") -> None:
    """`make_parent` for a single file, which a new one may replace.

    ends: what names of its kind end in; no end at all, or one that is no kind of file, is right, too.
    begins: the first bytes of a file of this kind. Raises UserError where the name is that of another kind, or where
    a folder, or a file that begins otherwise, is in its place.
    """
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder, and the result is a file; give another name.")
    if begins and os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                first = file.read(len(begins))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; give another name.") from None
        if first not in (begins, b""):
            raise UserError(f"{path} is there and is another kind of file; give another name, or move it away.")
    end = os.path.splitext(path)[1].lower()
    if end != ends and end in KINDS:
        raise UserError(
            f"{path} would be a {ends} file, and its name says {end}; give it a name that ends in {ends}."
        )
    make_parent(path)


def picture_place(path: str | os.PathLike) -> None:
    """`file_place` of a PNG file."""
    file_place(path, ".png", PNG)


def lying_in(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, besides the lock of a run and what a run has half-written."""
    return sorted(path for path in folder.iterdir() if not is_claim(path.name) and not path.name.endswith(SUFFIX))


def check_own(folder: Path, records: Iterable[str], verb: str) -> None:
    """Raises UserError unless a folder is new, is empty, or holds one of the files that `verb` (a command) leaves."""
    if folder.is_dir() and lying_in(folder) and not any((folder / name).is_file() for name in records):
        raise UserError(f"{folder} exists and was not written by ptq4dm {verb}; choose another folder.")


def take_away_leavings(folder: Path) -> None:
    """Take away what dead runs left in a folder: files half-written, and locks."""
    sweep(folder)
    sweep_claims(folder)


def check_writable(folder: Path) -> None:
    """Write something small into a folder and take it away. Raises UserError where that fails.

    What dead runs left in it is taken away.
    """
    take_away_leavings(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}; give another place.") from None


def check_room(folder: str | os.PathLike, need: int, what: str) -> None:
    """Raises UserError where a disk has less room than `need` bytes, for `what`."""
    place = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"{what} takes at least {_megabytes(need)} MB and the disk of {place} has {_megabytes(free)} MB left; "
            "make room, or give another place."
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}" if count > 1e8 else f"{count / 1e6:.3g}"
