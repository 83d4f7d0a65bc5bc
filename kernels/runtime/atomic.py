"""Files and folders that are whole at any time: made in a hidden folder beside, then renamed.

A process that is killed leaves its hidden folder, `.NAME.xxxxxxxx.ptq4dm`; it holds a lock on it for as long as it
lives, so `sweep` knows those of the dead and takes them away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there nothing is swept
    fcntl = None  # type: ignore[assignment]

SUFFIX, LOCK, OLD = ".ptq4dm", "lock", "old"
MADE = re.compile(r"\..+\.[a-z0-9_]{8}\.ptq4dm", re.DOTALL)
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` at the end and removed where anything fails.

    Two processes may write into one folder. A link is followed: what it leads to is replaced. The file's mode is that
    of any new file, whoever writes it.

    Raises OSError where the file cannot be written, or is no plain file (a device, a pipe, a folder).
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no plain file")
    with hidden_folder(path) as beside:
        temporary = beside / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there, that nobody else may read
        os.replace(temporary, path)


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, for as long as the block runs; nobody sweeps it while this process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=SUFFIX, dir=path.parent))
        with suppress(FileNotFoundError):  # somebody swept it before it was locked
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            if locked(lock) is not False and (folder / LOCK).exists():
                break
            os.close(lock)
    try:
        yield folder
    finally:
        _take_away(folder)
        os.close(lock)


def exchange(new: Path, place: Path, beside: Path) -> Path | None:
    """Put the folder `new` in the place of another, or of none; returns where the other one is now.

    There is no moment without a folder at `place` where the file system can exchange two names. Elsewhere a process
    killed at that moment leaves the old one as `old` in the hidden folder `beside`; `sweep` brings it back.
    """
    if not place.exists():
        os.rename(new, place)
        return None
    if _exchanged(new, place):
        return new
    (beside / "place").write_bytes(os.fsencode(place.name))
    old = beside / OLD
    os.rename(place, old)
    try:
        os.rename(new, place)
    except BaseException:
        os.rename(old, place)
        raise
    return old


def sweep(folder: Path) -> None:
    """Take away hidden folders that dead processes left in a folder; what is missing from its place comes back."""
    if fcntl is None:
        return
    for left in Path(folder).glob(f".*{SUFFIX}"):
        with suppress(OSError):
            try:
                lock = os.open(left / LOCK, os.O_RDWR)
            except FileNotFoundError:  # killed before it had its lock, or after; who lives makes another folder
                if MADE.fullmatch(left.name):
                    left.rmdir()
                continue
            try:
                if locked(lock) is True:
                    _restore(left)
                    _take_away(left)
            finally:
                os.close(lock)


def _take_away(folder: Path) -> None:
    """Remove a hidden folder, its lock last: killed in between, it is still known for one of the dead."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
        (folder / LOCK).unlink()
        folder.rmdir()


def _restore(left: Path) -> None:
    with suppress(FileNotFoundError):
        place = left.parent / os.fsdecode((left / "place").read_bytes())
        if (left / OLD).is_dir() and not place.exists():
            os.rename(left / OLD, place)


def locked(file: int, shared: bool = False) -> bool | None:
    """Whether we hold the lock on an open file now; other holders only where it is shared.

    It is let go when the file is closed, by whatever death. None where there are no locks: on Windows, and on some
    network file systems.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where that cannot be done here (Linux's renameat2)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    )
