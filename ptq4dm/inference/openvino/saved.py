"""Converted models in a folder beside the weights, found by what they were made of; made anew if gone or damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...caching.state import PLAIN
from ...errors import DamagedFile
from ...files.atomic import replacing_folder
from ...files.crc import checksum, file_checksum
from ...files.outside import outside, read_object
from ...files.places import make_parent
from ...version import __version__
from .compiled import installed

MODEL = "model.xml"
RECORD = "checksums.json"
LETTERS = 32  # of the name of a conversion's folder


def place_of(folder: Path, model: nn.Module, form: tuple) -> Path:
    """The folder of a model's conversion for calls of this form: another one for other weights, plans, adapters,
    settings, or versions."""
    facts: list[Any] = [__version__, installed(), torch.__version__, repr(model), form]
    for name, module in model.named_modules():
        facts += name, *_settings(vars(module))
        facts += [tuple(_settings(vars(one))) for one in vars(module).values() if _is_part(one)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        facts += name, tuple(tensor.shape), str(tensor.dtype), checksum(tensor.detach().cpu().contiguous())
    return folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:LETTERS]


def read(place: Path) -> Any:
    """The openvino.Model; None where there is none. Raises DamagedFile for one that is not as it was saved."""
    import openvino

    if not place.is_dir():
        return None
    check(place)
    with outside(place / MODEL):
        return openvino.Core().read_model(place / MODEL)


def check(place: Path) -> None:
    """Raises DamagedFile where a saved conversion is not as it was saved. Its files are read in full."""
    sums = read_object(place / RECORD, {"crc32": dict})["crc32"]
    for name, kept in ({MODEL: None} | sums).items():
        with outside(place / name):
            found = file_checksum(place / name)
        if found != kept:
            raise DamagedFile(f"{place / name} is not as it was saved.")


def count_saved(folder: Path) -> tuple[int, int]:
    """(how many conversions a folder holds, how many of them are damaged)."""
    places = [place for place in folder.iterdir() if place.is_dir() and len(place.name) == LETTERS]
    return len(places), sum(map(_is_damaged, places))


def _is_damaged(place: Path) -> bool:
    try:
        check(place)
    except DamagedFile:
        return True
    return False


def write(made: Any, place: Path) -> None:
    """Save it. Raises UserError where the folder cannot be written into."""
    import openvino

    make_parent(place)
    with replacing_folder(place) as folder:
        openvino.save_model(made, folder / MODEL, compress_to_fp16=False)
        sums = {file.name: file_checksum(file) for file in sorted(folder.iterdir())}
        (folder / RECORD).write_text(json.dumps({"crc32": sums}, indent=1), encoding="utf-8")


def _settings(attributes: dict[str, Any]) -> Iterable[str]:
    """What decides on a forward pass beside tensors: numbers and texts, also in containers, as adapters' scales."""
    for name, value in sorted(attributes.items()):
        if name[:1] != "_" and name != "forward":
            inner = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            if all(isinstance(one, PLAIN) for one in inner):
                yield f"{name}={value!r}"


def _is_part(value: Any) -> bool:
    """An object that a module computes by, and that is no module: attention's processor."""
    return callable(value) and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type))
