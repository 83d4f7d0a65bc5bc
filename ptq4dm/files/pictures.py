"""Pictures of others: opened here, so that whatever is wrong with one is told in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from .outside import outside


@contextmanager
def opened_picture(path: str | os.PathLike, advice: str = "") -> Iterator[Image.Image]:
    """A picture; its pixels are read in the block. Raises DamagedFile, also for what would fill the memory."""
    with outside(path, advice), Image.open(path) as picture:
        yield picture


def check_picture(path: str | os.PathLike, advice: str = "") -> None:
    """Raises DamagedFile where the checksums in a picture's file do not fit, or it is cut short."""
    with opened_picture(path, advice) as picture:
        picture.verify()
