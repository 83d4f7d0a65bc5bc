"""Converted models in a folder beside the weights, found by what they were made of; made anew when they are gone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...caching.state import PLAIN
from ...files.atomic import replacing_folder
from ...files.crc import checksum
from ...files.places import make_parent
from ...version import __version__
from .compiled import installed

MODEL = "model.xml"


def place_of(folder: Path, model: nn.Module, form: tuple) -> Path:
    """The folder of a model's conversion for calls of this form: another one for other weights, plans, adapters,
    settings, or versions."""
    facts: list[Any] = [__version__, installed(), torch.__version__, repr(model), form]
    for name, module in model.named_modules():
        facts += name, *_settings(vars(module))
        facts += [tuple(_settings(vars(one))) for one in vars(module).values() if _is_part(one)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        facts += name, tuple(tensor.shape), str(tensor.dtype), checksum(tensor.detach().cpu().contiguous())
    return folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def read(place: Path) -> Any:
    """The openvino.Model; None where there is none, or one that OpenVINO cannot read."""
    import openvino

    if (place / MODEL).is_file():
        with suppress(RuntimeError):
            return openvino.Core().read_model(place / MODEL)
    return None


def write(made: Any, place: Path) -> None:
    """Save it. Raises UserError where the folder cannot be written into."""
    import openvino

    make_parent(place)
    with replacing_folder(place) as folder:
        openvino.save_model(made, folder / MODEL, compress_to_fp16=False)


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
