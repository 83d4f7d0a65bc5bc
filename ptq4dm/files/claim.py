"""Two runs at once: a run claims the folder or file that it writes, for as long as it lives.

    with claimed(folder, settings): ...                  of the same settings, one after another
    with claimed(folder, settings, share=True): ...      of the same settings, side by side
    with claimed_whole(path, settings): ...              a file, or a folder that is replaced: the lock lies beside it

A second run with other settings is refused before it works. The claim is a lock on a hidden file, so it ends with the
process, whatever ends that. Where a file system has no locks, and on Windows, nobody is kept away.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..kernels.runtime.atomic import fcntl, locked
from ..progress import note

CLAIM = ".ptq4dm-run"  # in a folder; .NAME.ptq4dm-run beside a file
_MINE: ContextVar[frozenset[tuple[str, str]]] = ContextVar("claimed", default=frozenset())  # by this thread


@contextmanager
def claimed(folder: str | os.PathLike, settings: Any, *, share: bool = False) -> Iterator[None]:
    """Keep runs with other settings out of a folder (it exists) while the block runs.

    settings: all that decides what is written, as JSON holds it. share: runs of the same settings may write at the
    same time; otherwise the second waits, and says so.

    Raises UserError where a run with other settings writes there now.
    """
    with _claimed(Path(folder), Path(folder) / CLAIM, digest(settings), share):
        yield


@contextmanager
def claimed_whole(path: str | os.PathLike, settings: Any) -> Iterator[None]:
    """Keep other runs from a file, or from a folder that is replaced whole, while the block runs; its parent exists.

    A second run of the same settings waits, and says so. Raises UserError where one with other settings writes it.
    """
    real = Path(os.path.realpath(path))
    with _claimed(Path(path), real.with_name(f".{real.name[:100]}{CLAIM}"), digest(settings), share=False):
        yield


def is_claim(name: str) -> bool:
    """Whether a file of this name is the lock of a run."""
    return name.endswith(CLAIM)


def sweep_claims(folder: str | os.PathLike) -> None:
    """Take away the locks in a folder of runs that are dead, where that can be done."""
    if fcntl is None:
        return
    for path in Path(folder).glob(f"*{CLAIM}"):
        with suppress(OSError):
            file = os.open(path, os.O_RDWR)
            try:
                with _alone(path.parent):
                    if locked(file) is True and os.path.samestat(os.fstat(file), path.stat()):
                        path.unlink()
            finally:
                os.close(file)


@contextmanager
def _claimed(what: Path, lock: Path, settings: str, share: bool) -> Iterator[None]:
    mine = (os.path.realpath(lock), settings)
    if fcntl is None or mine in _MINE.get():  # a caller of ours has claimed it already
        yield
        return
    with _held(what, lock, settings, share):
        outer = _MINE.set(_MINE.get() | {mine})
        try:
            yield
        finally:
            _MINE.reset(outer)


def digest(settings: Any, default: Callable[[Any], Any] | None = None) -> str:
    """16 hex digits of SHA-256 over settings, as JSON writes them; default: of what JSON does not know."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=default).encode()).hexdigest()[:16]


@contextmanager
def _held(what: Path, path: Path, mine: str, share: bool) -> Iterator[None]:
    folder, waited = path.parent, False
    while True:
        file = _open(path)
        with _alone(folder):  # one at a time looks and takes
            first = locked(file)
            if first is None:  # no locks here
                break
            if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):
                os.close(file)  # the last holder took it away meanwhile
                continue
            if first:
                _sign(file, folder, mine)
                if share:
                    locked(file, shared=True)
                break
            theirs, _, process = os.pread(file, 200, 0).decode(errors="replace").partition(" ")
            if theirs != mine:
                os.close(file)
                raise UserError(
                    f"another run with other settings is writing into {what} (process {process}); "
                    "give another folder, or wait for its end."
                )
            if share and locked(file, shared=True):
                break
        if not waited:
            note(f"waiting for another run with the same settings in {what} (process {process})")
        waited = True
        fcntl.flock(file, fcntl.LOCK_SH)  # until the other lets go; then from the start
        os.close(file)
    try:
        yield
    finally:
        with _alone(folder):
            if locked(file) is True:  # the last one takes it away
                with suppress(OSError):
                    path.unlink()
            os.close(file)


def _sign(file: int, folder: Path, mine: str) -> None:
    try:
        os.truncate(file, 0)
        os.pwrite(file, f"{mine} {os.getpid()}".encode(), 0)
    except OSError as error:
        os.close(file)
        raise UserError(f"cannot write into {folder}: {error.strerror}; make room, or give another folder.") from None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror}; give another folder.") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, for a moment: a lock on the folder itself."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # network file systems lock no folders
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
