"""Whether a saved pipeline or model is still what was saved: every bit of its quantized networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import checked
from ..errors import DamagedFile, UserError
from ..files.outside import TensorFile, naming, outside, read_object, read_tensors
from ..pipelines.folder import is_file_name
from .checksums import changed, told
from .recipe import QuantConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
ADVICE = "copy or download it again"


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
    configs = {name: config for name, place in found.items() if (config := _config(place)) is not None}
    if not configs:
        raise UserError(f"{folder} holds no network that ptq4dm has quantized, so there is nothing to verify.")
    for name, config in configs.items():
        if config.plan is None or config.checksums is None:
            raise UserError(f"{found[name]} was saved without checksums, by an earlier version; save it again.")
    wrong = []
    for name, config in configs.items():
        tensors = _tensors(found[name])
        if layers := changed(config.checksums, config.plan, tensors):
            wrong.append(f"{name}: {told(layers)}" if name else told(layers))
    if wrong:
        raise DamagedFile(f"{folder} is not as it was saved; changed: {'; '.join(wrong)}; {ADVICE}.")
    return {name: len(config.plan.layers) for name, config in configs.items()}


def _folders(folder: Path) -> list[Path]:
    with outside(folder):
        return sorted(place for place in folder.iterdir() if (place / "config.json").is_file())


def _config(place: Path) -> Any:
    """The recipe of a quantized network's folder; None of another's."""
    if not (place / "config.json").is_file():
        return None
    entry = read_object(place / "config.json", {}, ADVICE).get("quantization_config")
    if not isinstance(entry, dict) or entry.get("quant_method") != "ptq4dm":
        return None
    with naming(place / "config.json"):
        return QuantConfig.from_dict(entry)


def _tensors(place: Path) -> dict[str, Tensor]:
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
