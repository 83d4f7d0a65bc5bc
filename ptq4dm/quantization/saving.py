"""The folder that `ptq4dm quantize` leaves, a diffusers pipeline with its plan, its report and a card; and whether it
is still what was saved: every bit of its quantized networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checks import checked
from ..errors import DamagedFile, UserError
from ..files.outside import TensorFile, naming, outside, read_object, read_tensors
from ..files.result_folder import result_folder
from ..layers.view import find_layers
from ..pipelines.denoiser import networks_of
from ..pipelines.folder import is_file_name
from .checksums import changed, told
from .components import PLANS, networks_to_quantize, save_plans
from .recipe import QuantConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RECORD = "quantization.json"  # beside model_index.json: the report, with the original's name

WEIGHTS = "diffusion_pytorch_model.safetensors"
ADVICE = "copy or download it again"

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


@checked
def verify(folder: str | os.PathLike) -> dict[str, int]:
    """Component -> how many quantized layers it has; they, and all its other tensors, are as they were saved.

    folder: of a pipeline, or of one model, whose name is then "". Networks that are not quantized have no checksums
    and are not looked at. Everything is read: a second for a gigabyte, and what the disk takes.

    Raises:
        DamagedFile: something changed; the message names the layers.
        UserError: nothing in it was quantized by ptq4dm, or it was saved by a version that made no checksums.
    """
    folder = Path(folder)
    found = {"" if place == folder else place.name: place for place in (folder, *_folders(folder))}
    configs = {name: config for name, place in found.items() if (config := recipe_in(place)) is not None}
    if not configs:
        raise UserError(f"{folder} holds no network that ptq4dm has quantized, so there is nothing to verify.")
    for name, config in configs.items():
        if config.plan is None or config.checksums is None:
            raise UserError(f"{found[name]} was saved without checksums, by an earlier version; save it again.")
    wrong = []
    for name, config in configs.items():
        tensors = network_tensors(found[name])
        if layers := changed(config.checksums, config.plan, tensors):
            wrong.append(f"{name}: {told(layers)}" if name else told(layers))
    if wrong:
        raise DamagedFile(f"{folder} is not as it was saved; changed: {'; '.join(wrong)}; {ADVICE}.")
    return {name: len(config.plan.layers) for name, config in configs.items()}


def _folders(folder: Path) -> list[Path]:
    with outside(folder):
        return sorted(place for place in folder.iterdir() if (place / "config.json").is_file())


def recipe_in(place: Path) -> Any:
    """The recipe of a quantized network's folder; None of another's."""
    if not (place / "config.json").is_file():
        return None
    entry = read_object(place / "config.json", {}, ADVICE).get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != "ptq4dm":
        return None
    with naming(place / "config.json"):
        return QuantConfig.from_dict(entry)


def network_tensors(place: Path) -> dict[str, Tensor]:
    """All tensors of a network's safetensors files, mapped, not read."""
    index = place / f"{WEIGHTS}.index.json"
    if (place / WEIGHTS).is_file() or not index.is_file():
        files = [WEIGHTS] if (place / WEIGHTS).is_file() else [path.name for path in place.glob("*.safetensors")]
    else:
        names = read_object(index, {"weight_map": dict}, ADVICE)["weight_map"].values()
        files = sorted({name for name in names if is_file_name(name)})
    if not files:
        raise DamagedFile(f"{place} holds no safetensors file; {ADVICE}.")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= read_tensors(place / name, TensorFile.tensors, ADVICE)
    return tensors
