"""The folder that `ptq4dm quantize` leaves: a diffusers pipeline, its plan, its report and a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..files.outside import read_object
from ..files.result_folder import result_folder
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


def original_of(model: str) -> str | None:
    """What `quantize` made a model from; None if it did not make this one. Raises DamagedFile."""
    record = Path(model) / RECORD
    if not record.is_file():
        return None
    return read_object(record, {"model": str}, "name the original model with --full-precision")["model"]


def save_quantized(pipe: DiffusionPipeline, record: dict, folder: Path) -> None:
    """Save a quantized pipeline with its plan, its report (`record`, with the original's name) and a card."""
    with result_folder(folder, RECORD, record) as new:
        pipe.save_pretrained(new)
        (new / "README.md").write_text(CARD.format(**record), encoding="utf-8")
        save_plans(pipe, new / "plan.json")
