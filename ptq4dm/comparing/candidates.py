"""What is compared: folders with short names, and the one model that they were all made from."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.outside import checked_object, outside, read_object
from ..pipelines.load import folder_of
from ..quantization.saving import RECORD, original_of

Kind = type | tuple[type, ...]
WORST = 10  # layers that are told of each model
ROW: dict[str, Kind] = {"layer": str, "format": str, "kernel": str}  # of every layer
ERROR: dict[str, Kind] = {
    "basis": str,
    "sqnr": (float, int, str, type(None)),
}  # of those that `quantize` made, not of a file's


@dataclass(frozen=True)
class Candidate:
    """A model: its name as the user gave it, and a label that names its row and its folder of images."""

    model: str
    label: str


def labelled(models: Sequence[str | os.PathLike]) -> list[Candidate]:
    """Candidates of several models, each labelled by the last part of its name, or the last two where that is taken.

    Raises UserError where two are the same, or cannot be told apart.
    """
    names = [os.fspath(model) for model in models]
    places: dict[str, str] = {}
    for name in names:
        folder = folder_of(name)
        place = os.path.realpath(folder) if folder.is_dir() else name
        if place in places:
            same = f"{name} is given twice" if name == places[place] else f"{places[place]} and {name} are one model"
            raise UserError(f"{same}; name each model once.")
        places[place] = name
    parts = [Path(name).absolute().parts if os.path.isdir(name) else Path(name).parts for name in names]
    for length in (1, 2, 3):
        labels = [re.sub(r"[^\w.+-]", "-", "-".join(part[-length:])).lstrip(".-")[:100] or "model" for part in parts]
        twice = [label for label, count in Counter(map(str.lower, labels)).items() if count > 1]
        if not twice:
            return [Candidate(*pair) for pair in zip(names, labels, strict=True)]
    alike = [name for name, label in zip(names, labels, strict=True) if label.lower() == twice[0]]
    raise UserError(f"the names of {' and '.join(alike)} end alike, and name the rows; rename a folder.")


def original(models: Sequence[str | os.PathLike], full_precision: str | os.PathLike | None) -> str:
    """The model in full precision that all are compared with: as the user says, or what they were quantized from.

    Raises UserError where nobody knows it, or they were quantized from different ones.
    """
    if full_precision is not None:
        return os.fspath(full_precision)
    made = {os.fspath(model): found for model in models if (found := original_of(os.fspath(model))) is not None}
    if not made:
        raise UserError("none of these models says what it was quantized from; name that with --full-precision.")
    (first, one), *others = made.items()
    for model, other in others:
        if other != one:
            raise UserError(
                f"{first} was quantized from {one} and {model} from {other}: different models cannot be compared. "
                "If these are two names of one model, give it with --full-precision."
            )
    return one


def worst_layers(model: str) -> list[dict[str, Any]]:
    """The layers with the largest error in a quantized folder's report, worst first; none for another model, nor for
    one whose layers were read from a file of another tool: nobody knows the floats that they were made from.

    Rows of layer, format, kernel, basis ("output" or "weight") and sqnr in dB: None without any error, "nan" where
    the layer gives NaN. Raises DamagedFile.
    """
    record = Path(model) / RECORD
    if not record.is_file():
        return []
    layers = read_object(record, {"layers": list}, "quantize the model again")["layers"][:WORST]
    with outside(record, "quantize the model again"):
        if not any(ERROR.keys() & checked_object(row, ROW).keys() for row in layers):
            return []
        rows = [checked_object(row, {**ROW, **ERROR}) for row in layers]
    return [{key: row[key] for key in (*ROW, *ERROR)} for row in rows]
