"""The folder that `ptq4dm quantize` leaves: a diffusers pipeline, its plan, its report and a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..files.outside import read_object
from ..files.result_folder import result_folder
from ..layers.view import find_layers
from ..pipelines.denoiser import networks_of
from .components import PLANS, networks_to_quantize, save_plans

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .recipe import QuantConfig

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


def bytes_at_least(pipe: DiffusionPipeline, recipes: dict[str, QuantConfig]) -> int:
    """Bytes that a pipeline certainly takes on the disk when it is quantized by these recipes: network -> recipe.

    What is not quantized is saved as it is. Of a network that is, only what is no weight of a layer counts: how many
    bits the layers get, their plan will say.
    """
    quantized = {name for one in recipes for name in networks_to_quantize(pipe, one or None)}
    total = 0
    for name, module in networks_of(pipe).items():
        layers = {f"{view.name}.weight" for view in find_layers(module)} if name in quantized else set()
        found = {key if one.is_meta else one.data_ptr(): (key, one) for key, one in module.state_dict().items()}
        state = dict(found.values())  # what two modules share is saved once
        total += sum(one.numel() * one.element_size() for key, one in state.items() if key not in layers)
        total += sum(state[key].numel() for key in layers if key in state) // 8  # a bit for each weight
    return total


def save_quantized(pipe: DiffusionPipeline, record: dict, folder: Path) -> None:
    """Save a quantized pipeline with its plan, its report (`record`, with the original's name) and a card."""
    with result_folder(folder, RECORD, record) as new:
        pipe.save_pretrained(new)
        (new / "README.md").write_text(CARD.format(**record), encoding="utf-8")
        save_plans(pipe, new / PLANS)
