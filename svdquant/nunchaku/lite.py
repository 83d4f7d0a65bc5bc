"""Reading diffusers' `nunchaku_lite` checkpoints: safetensors files in a folder with a config.json that holds

    "quantization_config": {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16",
        "svdq_w4a4":  {"precision": "int4" | "nvfp4", "group_size": 64 | 16, "rank": R, "targets": [layer names]},
        "awq_w4a16":  {"precision": "int4", "group_size": 64, "targets": [layer names]}}

The layers become ours, which run on any device, and save and load as ours do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import nn

from ...checks import checked
from ...errors import UserError
from ...files.outside import naming
from ...pipelines.devices import dtype_of
from ...pipelines.folder import is_file_name
from ...pipelines.loading import loading
from ...undo import whole_or_not
from .model import Checkpoint, empty_model, install, linear_of, read_files, read_json
from .tensors import nvfp4_layer, svdq_layer, take_awq, take_svdq

WEIGHTS = "diffusion_pytorch_model.safetensors"
GROUP_SIZES = {"int4": 64, "nvfp4": 16}


@dataclass
class Section:
    """One operator of the config and the layers it is for."""

    precision: str
    group_size: int
    targets: list[str]
    rank: int = 0


@checked
@loading()
def load_nunchaku_lite(
    source: str | os.PathLike, model: nn.Module | None = None, dtype: torch.dtype | str | None = None
):
    """Load a checkpoint of 4-bit layers.

    Args:
        source: the model's folder, or its one safetensors file beside config.json. (A pipeline's folder has them in a
            folder below, `transformer` or `unet`.)
        model: a diffusers model in full precision, made from the same config, that is changed in place; its devices
            and dtypes stay. Without one, the class that config.json names is made, on the CPU.
        dtype: of that model; the checkpoint's compute_dtype if not given.

    Returns:
        The model. Its `save_pretrained` writes our own format, which `from_pretrained` loads with the same outputs.

    Raises:
        UserError: what is missing, left over, of another shape or not representable, by name; a model that was given
            is then as it was.
    """
    source, dtype = Path(source).expanduser(), None if dtype is None else dtype_of(dtype)
    folder = source if source.is_dir() else source.parent
    config = read_json(folder / "config.json", str(folder / "config.json"))
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "nunchaku_lite":
        raise UserError(f"{folder / 'config.json'} has no quantization_config of nunchaku_lite.")
    svdq = _section(quantization, "svdq_w4a4", "rank")
    awq = _section(quantization, "awq_w4a16")
    if svdq is None and awq is None:
        raise UserError(f"{folder / 'config.json'} names no 4-bit layers: it has neither svdq_w4a4 nor awq_w4a16.")
    checkpoint = read_files(source, _files(source))
    with naming(folder):
        if model is None:
            model = empty_model(_model_class(config), config, dtype or _compute_dtype(quantization))
        whole_or_not([model], lambda gate: install(model, _layers(model, checkpoint, svdq, awq), checkpoint))
    return model


def _layers(model: nn.Module, checkpoint: Checkpoint, svdq: Section | None, awq: Section | None):
    """target -> its layer."""
    layers: dict[str, nn.Module] = {}
    for section in (svdq, awq):
        for name in section.targets if section is not None else ():
            linear = linear_of(model, name)
            n, k, bias = linear.out_features, linear.in_features, linear.bias is not None
            if name in layers:
                raise UserError(f"config.json names layer '{name}' twice.")
            if section is awq:
                layers[name] = svdq_layer(linear, take_awq(checkpoint, name, n, k, bias))
                continue
            nvfp4 = section.precision == "nvfp4"
            plain = take_svdq(checkpoint, name, n, k, section.rank, bias, nvfp4)
            layers[name] = nvfp4_layer(linear, plain) if nvfp4 else svdq_layer(linear, plain)
    return layers


def _section(quantization: dict, name: str, *more: str) -> Section | None:
    data = quantization.get(name)
    if data is None:
        return None
    kinds = {"precision": str, "group_size": int, "targets": list} | dict.fromkeys(more, int)
    for key, kind in kinds.items():
        value = data.get(key) if isinstance(data, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"'{name}' in config.json needs '{key}', of type {kind.__name__}.")
    section = Section(**{key: data[key] for key in kinds})
    precisions = ("int4", "nvfp4") if name == "svdq_w4a4" else ("int4",)
    if section.precision not in precisions or section.group_size != GROUP_SIZES[section.precision]:
        known = " and ".join(f"{precision} in groups of {GROUP_SIZES[precision]}" for precision in precisions)
        raise UserError(
            f"'{name}' in config.json is {section.precision} in groups of {section.group_size}; known is {known}."
        )
    if section.rank < 0 or section.rank % 16:
        raise UserError(f"'{name}' in config.json has rank {section.rank}; the layout needs multiples of 16.")
    if not section.targets or not all(isinstance(target, str) for target in section.targets):
        raise UserError(f"'targets' of '{name}' in config.json is no list of layer names.")
    return section


def _files(source: Path) -> list[Path]:
    """The safetensors files of a folder, those of an index if there is one."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"there is no {source}.")
    if indices := sorted(source.glob("*.safetensors.index.json")):
        names = read_json(indices[0], str(indices[0])).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{indices[0]} has no weight_map.")
        if outside := [name for name in names.values() if not is_file_name(name)]:
            raise UserError(f"{indices[0]} leads out of its folder, with '{outside[0]}'.")
        return [source / name for name in sorted(set(names.values()))]
    files = sorted(source.glob("*.safetensors"))
    if (source / WEIGHTS) in files:
        return [source / WEIGHTS]
    if len(files) != 1:
        raise UserError(f"{source} holds {len(files)} safetensors files and no index; name the file.")
    return files


def _model_class(config: dict) -> type[nn.Module]:
    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise UserError(f"config.json names the class {name!r}, which is no model of diffusers; pass a model.")
    return found


def _compute_dtype(quantization: dict) -> torch.dtype:
    return dtype_of(quantization.get("compute_dtype", "bfloat16"), "compute_dtype in config.json")
