"""Safetensors files of ComfyUI and of Black Forest Labs: which layer has which format.

ComfyUI's say it in JSON, {"format": ...}, as bytes in `<layer>.comfy_quant`, or for all layers in the header's
`_quantization_metadata`; older ones have a tensor `scaled_fp8`, and `scale_weight` for `weight_scale`. Black Forest
Labs' say nothing: types and names do. formats.py has the formats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import DamagedFile, UserError
from ..files.outside import checked_object, outside, parse_json, read_tensors, reason
from .formats import E4M3, READERS, bfl_nvfp4, float8
from .rows import PREFIXES, Found, Rows
from .stored_layer import FLOATS, StoredLayer, UnknownFormatError

WEIGHT, CONFIG, ALL = ".weight", ".comfy_quant", "_quantization_metadata"
SCALED, OLD = "scaled_fp8", {".scale_weight": ".weight_scale", ".scale_input": ".input_scale"}
ADVICE = "give a whole safetensors or GGUF file"


def read_comfy(path: str | os.PathLike) -> Found:
    """The quantized weights and the other tensors of a file.

    Raises UserError, naming the layer, for a format that there are no layers for, and DamagedFile where the file is
    not whole or a layer in it is not.
    """
    tensors, header = read_tensors(path, lambda file: (file.tensors(), file.header), ADVICE)
    with outside(path):
        configs = _configs(tensors, header)
    weights = {}
    for name in [key.removesuffix(WEIGHT) for key in tensors if key.endswith(WEIGHT)]:
        try:
            rows = _rows(StoredLayer(name, tensors, configs.pop(name, {})))
        except ValueError as error:
            raise DamagedFile(f"layer '{name}' of {path} cannot be read: {error}.") from None
        except UnknownFormatError as error:
            raise UserError(f"layer '{name}' of {path} is {error}.") from None
        if rows is not None:
            weights[name + WEIGHT] = rows
    if configs:
        raise DamagedFile(f"{path} says how '{next(iter(configs))}' is quantized, and has no weight of it.")
    return Found(str(path), weights, tensors)


def _rows(layer: StoredLayer) -> Rows | None:
    """A quantized weight; None where it is floats."""
    if layer.config:
        format_ = layer.config["format"]
        if format_ not in READERS:
            raise UnknownFormatError(f"{format_}, for which there are no layers; what loads is {', '.join(READERS)}")
        return READERS[format_](layer)
    kind = layer.dtype
    if kind == E4M3:
        return float8(layer)
    if kind == torch.uint8 and layer.has("weight_scale_2"):
        return bfl_nvfp4(layer)
    if kind in (*FLOATS, torch.float64):
        return None
    raise UnknownFormatError(f"{str(kind).removeprefix('torch.')} without a word on its format")


def _configs(tensors: dict[str, Tensor], header: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Name of a layer -> its JSON, taken out of a file's tensors; older names become new ones. Raises ValueError."""
    configs: dict[str, dict[str, Any]] = {}
    for key in [key for key in tensors if key.endswith(CONFIG)]:
        text = tensors.pop(key)
        if text.dtype != torch.uint8:
            raise ValueError(f"its '{key}' is no text")
        with _saying(f"'{key}'"):
            configs[key.removesuffix(CONFIG)] = _config(parse_json(bytes(text.tolist())))
    if ALL in header:
        for name, config in checked_object(parse_json(header[ALL]), {"layers": dict})["layers"].items():
            names = [prefix + name for prefix in ("", *PREFIXES) if prefix + name + WEIGHT in tensors]
            with _saying(f"'{name}' of its {ALL}"):
                configs.setdefault(names[0] if names else name, _config(config))
    if marks := [key for key in tensors if key.rpartition(".")[2] == SCALED]:
        exact = tensors.pop(marks[0]).numel() == 2
        for name in [key.removesuffix(".scale_weight") for key in tensors if key.endswith(".scale_weight")]:
            configs.setdefault(name, {"format": "float8_e4m3fn", "full_precision_matrix_mult": exact})
            for old, new in OLD.items():
                scale = tensors.pop(name + old, None)
                if scale is not None and not (new == ".input_scale" and scale.numel() == 1 and float(scale) == 1):
                    tensors[name + new] = scale  # in these files an input's scale of 1 means none
    return configs


def _config(value: Any) -> dict[str, Any]:
    """The JSON of a layer; some writers have the name of the format alone."""
    return checked_object({"format": value} if isinstance(value, str) else value, {"format": str})


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Say in which part of a file the JSON of this block is damaged."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {reason(error)}") from None
