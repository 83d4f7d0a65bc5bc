"""Captions of a folder's pictures: metadata.jsonl, as the ImageFolder of Hugging Face's datasets has it.

    {"file_name": "dog/1.png", "text": "a dog on grass"}

A line a picture, paths from the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DamagedFile, UserError
from ..files.outside import checked_object, outside, parse_json

NAME = "metadata.jsonl"
LINE = {"file_name": str, "text": str}


def read_captions(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """The caption of each picture of the folder.

    Raises:
        UserError: there is no metadata.jsonl, or it names no caption, or two, of a picture, or a picture that is not
            there.
        DamagedFile: a line is not what the datasets library reads.
    """
    path, found = folder / NAME, {}
    if not path.is_file():
        raise UserError(
            f"a model of text learns from captions, and {folder} has no {NAME}: give it a line a picture, "
            '{"file_name": "1.png", "text": "a dog on grass"}.'
        )
    with outside(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            row = checked_object(parse_json(line), LINE)
            name = Path(row["file_name"]).as_posix()
            if name in found:
                raise DamagedFile(f"{path} names '{name}' twice.")
            found[name] = row["text"]
    names = [one.relative_to(folder).as_posix() for one in pictures]
    if without := [name for name in names if name not in found]:
        raise UserError(f"{path} has no caption of '{without[0]}' ({len(without)} pictures are without one).")
    if strange := found.keys() - set(names):
        raise UserError(f"{path} names '{min(strange)}', and there is no such picture.")
    return [found[name] for name in names]
