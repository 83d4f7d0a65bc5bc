"""Files that are whole at any time: written beside, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` at the end and removed where anything fails.

    Its name is hidden, ends in .tmp and is this process's own: two processes may write into one folder. Its mode is
    that of any new file, whoever writes it.

    Raises OSError where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there, that nobody else may read
        os.replace(temporary, path)
    finally:
        if temporary.is_file():  # below a regular file even unlink(missing_ok=True) raises
            temporary.unlink()
