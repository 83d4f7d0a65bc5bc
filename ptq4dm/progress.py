"""Progress bars, and notes on stderr beside them: one way to make them, and one to keep them away.

Bars are shown where somebody looks: in a terminal and in notebooks. They are off where stderr goes to a file or a
pipe, in a block of `quiet()`, and with TQDM_DISABLE=1 in the environment, which is tqdm's own switch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_quiet = 0  # blocks of quiet() that are open, in whichever thread


def progress_bar(iterable: Iterable | None = None, *, hidden: bool = False, **more: Any) -> Any:
    """A tqdm bar, over `iterable` if there is one. hidden: not this one; more: what tqdm takes (desc, unit, ...)."""
    from tqdm.auto import tqdm

    off = {"disable": True} if hidden or not shown() else {}  # not said otherwise: TQDM_DISABLE decides
    return tqdm(iterable, **more, **off)


def shown() -> bool:
    """Whether bars are shown: not in a block of `quiet()`, and only in a terminal or a notebook."""
    if _quiet:
        return False
    return in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


def in_notebook() -> bool:
    """Whether tqdm draws in a notebook, whose stderr is no terminal."""
    from tqdm.auto import tqdm

    notebook = sys.modules.get("tqdm.notebook")
    return notebook is not None and issubclass(tqdm, notebook.tqdm_notebook)


@contextmanager
def quiet() -> Iterator[None]:
    """A block without progress bars and notes."""
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


def note(text: str) -> None:
    """Tell whoever waits, on stderr; nothing in a block of `quiet()`."""
    if not _quiet:
        print(text, file=sys.stderr)
