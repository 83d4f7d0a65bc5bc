"""A pipeline's folder into a folder of the quantized pipeline: its denoisers layer by layer, the rest as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..checks import checked
from ..errors import UserError
from ..files.outside import TensorFile, naming, read_object, read_tensors
from ..files.places import check_room
from ..files.result_folder import check_replaceable, result_folder
from ..layers.sizes import bytes_in_16_bits, full_bytes, stored_bytes
from ..layers.view import find_layers
from ..pipelines.denoiser import MAIN, is_timed
from ..pipelines.embedded import folder_of
from ..pipelines.folder import ADVICE, INDEX, check_folder
from ..quantization.components import PLANS, save_plans
from ..quantization.quantize import rows_of_layers
from ..quantization.recipe import QuantConfig
from ..quantization.report import QuantizationReport, badness
from ..quantization.saving import CARD, RECORD, bytes_at_least
from ..transforms.base import is_online
from ..transforms.named import named
from .network import Streamed, stream_network
from .shards import LIMIT


def denoisers_in(folder: Path) -> dict[str, type]:
    """Name -> class of the denoisers of a pipeline's folder, the main one first; {} where there is none."""
    kinds = {name: kind for name, (_, kind) in _components(folder).items() if kind is not None}
    main = [name for name in MAIN if name in kinds][:1]
    return {name: kinds[name] for name in [*main, *(n for n in kinds if n not in main and is_timed(kinds[n]))]}


def streams(folder: Path, config: QuantConfig, component: str | None = None) -> bool:
    """Whether `stream_folder` can do what is asked: a local folder, a recipe that looks at weights one by one."""
    if not (folder / INDEX).is_file() or not config.packs_while_loading or config.needs_calibration:
        return False
    if config.plan is not None or any(not is_online(named(text)[0].name) for text in config.changes):
        return False
    kinds = denoisers_in(folder)
    several = len(kinds) > 1 and component is None and bool(config.modules_to_not_convert)
    return bool(kinds) and component in (None, *kinds) and not several


@checked
def stream_folder(
    folder: str | os.PathLike,
    config: QuantConfig,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    component: str | None = None,
    limit: int = LIMIT,
    record: Mapping[str, Any] | None = None,
    show: Callable[[QuantizationReport], object] = lambda report: None,
) -> QuantizationReport:
    """Quantize the denoisers of a pipeline's folder, or one of them, into a new folder, without ever having a network
    whole in memory; see `stream_network`. Other networks are copied as they are stored.

    folder: of a pipeline in full precision, with its model_index.json.
    output: a new folder, an empty one, or one as an earlier run left it, which is replaced.
    dtype, device: what layers are read as, and where they are packed. limit: bytes of packed layers that are held.
    record: further facts for quantization.json. show: called with the report before the folder takes its place.

    Raises UserError where the folder has no such network, the recipe wants more than weights one by one, or something
    else is in the output's place.
    """
    folder, output = folder_of(folder), Path(output)
    _check_recipe(config)
    check_folder(folder, {})
    kinds = denoisers_in(folder)
    if component is not None and component not in kinds:
        raise UserError(f"{folder} has no denoiser '{component}'; it has {', '.join(kinds) or 'none'}.")
    if not kinds:
        raise UserError(f"{folder} has no denoiser, so there is nothing to quantize layer by layer.")
    names = [component] if component else list(kinds)
    check_replaceable(output, RECORD, "quantize")
    others = [name for name in _components(folder) if name not in names]
    copied = {name: _bytes_of(folder / name) for name in others}
    empty = SimpleNamespace(**{name: _empty(kinds[name], folder / name, dtype) for name in names})
    need = bytes_at_least(cast(Any, empty), {component or "": config}) + sum(copied.values())
    check_room(output.resolve().parent, need, "the quantized pipeline")
    facts: dict[str, Any] = {}
    with result_folder(output, RECORD, facts) as new:
        shutil.copyfile(folder / INDEX, new / INDEX)
        for name in others:
            shutil.copytree(folder / name, new / name)
        made = {
            name: stream_network(
                kinds[name], folder / name, new / name, config, dtype, device or torch.device("cpu"), limit
            )
            for name in names
        }
        report = _report(config, made, {name: size for name, size in copied.items() if size})
        show(report)
        facts |= {"model": str(folder), "dtype": str(dtype), **report.to_dict(), **(record or {})}
        (new / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
        save_plans(SimpleNamespace(**{name: one.model for name, one in made.items()}), new / PLANS)
    return report


def _check_recipe(config: QuantConfig) -> None:
    """Raises UserError where a recipe looks at more than weights one by one."""
    if not config.packs_while_loading or (config.needs_calibration and config.calibration is None):
        raise UserError(
            f"this {type(config).__name__} looks at layers together, or what they are fed, and cannot be streamed; "
            f"load the model in full precision, then call ptq4dm.quantize{config.otherwise(loading=True)}."
        )


def _empty(kind: Any, place: Path, dtype: torch.dtype) -> Any:
    """A network of shapes without values."""
    with init_empty_weights(), naming(place):
        network = kind.from_config(kind.load_config(place))
    # diffusers' own `to` warns of modules that stay float32, also where there are none.
    return nn.Module.to(network, dtype)


def _report(config: QuantConfig, made: Mapping[str, Streamed], copied: Mapping[str, int]) -> QuantizationReport:
    rows: list[dict] = []
    memory = {name: [full_bytes(one.model), stored_bytes(one.model)] for name, one in made.items()}
    for name, one in made.items():
        layers = {layer: one.model.get_submodule(layer) for layer in one.errors}
        prefix = f"{name}." if len(made) > 1 else ""
        found = rows_of_layers(layers, one.errors, "weight", prefix)
        rows += [row | {"kernel": one.kernels[row["layer"].removeprefix(prefix)]} for row in found]
    rows.sort(key=badness)
    models = [one.model for one in made.values()]
    before, after = (sum(sizes) for sizes in zip(*memory.values(), strict=True))
    report = QuantizationReport(config.summary(), before, after, rows, list(made), list(copied))
    report.kept = sum(len(find_layers(model)) for model in models)
    report.in_16_bits = sum(map(bytes_in_16_bits, models))
    report.full_in_16_bits = sum(full_bytes(model, sixteen=True) for model in models)
    report.memory = memory | {name: [size, size] for name, size in copied.items()}
    return report


def _components(folder: Path) -> dict[str, tuple[Path, type | None]]:
    """Name -> (folder, class where it is a network of diffusers) of the components of a pipeline's folder."""
    found: dict[str, tuple[Path, type | None]] = {}
    for name, value in read_object(folder / INDEX, {}, ADVICE).items():
        if name.startswith("_") or not (folder / name).is_dir():
            continue
        kind = getattr(diffusers, value[1], None) if isinstance(value, list) and value[0] == "diffusers" else None
        network = isinstance(kind, type) and issubclass(kind, ModelMixin)
        found[name] = folder / name, kind if network else None
    return found


def _bytes_of(place: Path) -> int:
    """Bytes of the tensors that lie in a component's folder."""

    def size(file: TensorFile) -> int:
        return sum(file.like(name).nbytes for name in file.names)

    return sum(read_tensors(path, size, ADVICE) for path in sorted(place.glob("*.safetensors")))
