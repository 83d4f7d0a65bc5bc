"""Files and folders of results: whole at any time, the old one or the new one, whatever kills the process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from ..kernels.runtime import atomic

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` at the end and removed where anything fails.

    Raises:
        UserError: the file cannot be written.
    """
    with told(path), atomic.replacing(path) as temporary:  # safetensors puts a file of its own there
        yield temporary


@contextmanager
def replacing_folder(folder: Path, foreign: Callable[[Path], list[str]] = lambda _: []) -> Iterator[Path]:
    """A new folder beside, to write into; at the end it takes the place of `folder`: always whole, old or new.

    A link is followed. foreign: what in the old folder is not ours: where it names anything, which must have come
    during the work, the old folder stays beside as NAME.before.

    Raises:
        UserError: it cannot be written.
    """
    named, folder = folder, Path(os.path.realpath(folder))
    with told(named), atomic.hidden_folder(folder) as beside:
        new = beside / "new"
        new.mkdir()
        yield new
        for path in new.rglob("*.safetensors"):  # which safetensors writes for their owner alone
            path.chmod(0o666 & new.stat().st_mode)
        old = atomic.exchange(new, folder, beside)
        if old is not None and foreign(old):
            os.rename(old, free_name(folder))


def free_name(folder: Path) -> Path:
    """NAME.before, or NAME.before-2 and so on where that is taken."""
    names = (f"{folder.name}.before" + (f"-{k}" if k > 1 else "") for k in range(1, 1000))
    return next(place for name in names if not os.path.lexists(place := folder.with_name(name)))


@contextmanager
def told(path: str | os.PathLike) -> Iterator[None]:
    """A failure to write in this block is a UserError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in FULL or "No space left" in str(error)  # as safetensors says it
        way = "make room, or give another place" if full else "give another place"
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; {way}.") from error
