"""The folder that `ptq4dm quantize` leaves: a diffusers pipeline, its plan, its report and a card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files.atomic import replacing_folder
from .components import save_plans

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RECORD = "quantization.json"  # beside model_index.json: the report, with the original's name

CARD = """---
library_name: diffusers
base_model: {model}
---
`{model}`, quantized by ptq4dm: {method}. Each layer is in `quantization.json`.

    import ptq4dm  # makes diffusers know the format
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("this folder, or its name on the hub")
"""


def check_output(folder: Path, record: str = RECORD, verb: str = "quantize") -> None:
    """Before the long work: the folder must be new, empty, or one that an earlier `quantize` (the verb) wrote."""
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / record).is_file():
        raise UserError(f"{folder} exists and was not written by ptq4dm {verb}; choose another --output.")
    make_parent(folder)


def make_parent(path: Path) -> None:
    """Before the long work: make the folder that a result goes into."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: {path.parent} is read-only; choose another place.")


def original_of(model: str) -> str | None:
    """What `quantize` made a model from; None if it did not make this one."""
    record = Path(model) / RECORD
    if not record.is_file():
        return None
    try:
        return json.loads(record.read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{record} is damaged; name the original model with --full-precision.") from None


def save_quantized(pipe: DiffusionPipeline, record: dict, folder: Path) -> None:
    """Save a quantized pipeline with its plan, its report (`record`, with the original's name) and a card."""
    with replacing_folder(folder) as new:
        pipe.save_pretrained(new)
        (new / "README.md").write_text(CARD.format(**record))
        (new / RECORD).write_text(json.dumps(record, indent=1))
        save_plans(pipe, new / "plan.json")
