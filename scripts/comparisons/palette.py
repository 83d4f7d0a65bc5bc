"""Pictures of few bytes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ptq4dm.files.atomic import replacing

COLOURS = 224


def few_colours(path: Path) -> None:
    """Write a picture again, with a palette: a third of the bytes."""
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
    with replacing(path) as temporary:
        few.save(temporary, format="png", optimize=True)
