"""Loading a file that another tool quantized: names, layers, and all the rest, or nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..checks import checked
from ..errors import UserError
from ..files.gguf import is_gguf
from ..layers.base import holds_quantized
from ..pipelines.loading import loading
from ..quantization.components import component_of
from ..quantization.refusals import check_model
from ..quantization.saving import recipe_in
from ..svdquant.nunchaku.model import Checkpoint, install
from ..undo import whole_or_not
from .comfy import ADVICE, read_comfy
from .gguf import read_gguf
from .imported import ImportedConfig
from .names import in_names_of
from .rows import Found, floats_of, layer_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WEIGHT = ".weight"
PACKED = ".qweight"  # how libraries that save codes call them, and no file that is read here


@checked
@loading()
def load_quantized_file(
    target: DiffusionPipeline | nn.Module, file: str | os.PathLike, component: str | None = None
) -> nn.Module:
    """Load the denoiser of a GGUF file, or of a safetensors file of ComfyUI or of Black Forest Labs.

    Weights of Linear layers become quantized layers with the file's own codes and scales; quantized weights of
    anything else become floats. interchange/README.md has the formats.

    Args:
        target: a pipeline, or a model of diffusers, in full precision or on the meta device, of the file's
            architecture. It is changed in place: all its weights become those of the file.
        file: its names are the model's, or those that diffusers' `from_single_file` knows for its class.
        component: which network of the pipeline, its denoiser if not given.

    Returns:
        The network, of its device and dtype as before; on the CPU, where it was on the meta device. Its
        `save_pretrained` writes our own format.

    Raises:
        UserError: a format that there are no layers for, names or shapes that are not the model's, a model that is
            quantized already, by name. The target is then as it was.
    """
    model, file = component_of(target, component), Path(file).expanduser()
    if holds_quantized(model):
        raise UserError(f"the {type(model).__name__} has quantized layers; load into one in full precision.")
    if not all(one.is_meta for one in model.parameters()):
        check_model(model)  # adapters, offloading: what quantizing refuses, too
    found = read(file)
    _check_foreign(found, file)
    if not found.weights:
        raise UserError(f"{file} holds floats alone; load it with diffusers' from_single_file, and quantize it.")
    found = in_names_of(model, found)
    layers: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, rows in found.weights.items():
        stem = name.removesuffix(WEIGHT)
        linear = modules.get(stem)
        if name.endswith(WEIGHT) and linear is not None and type(linear) is nn.Linear:
            bias = None if linear.bias is None else found.tensors.pop(f"{stem}.bias", None)
            layers[stem] = layer_of(linear, rows, bias, stem, found.where)
        else:
            found.tensors[name] = floats_of(rows, name, found.where)
    checkpoint = Checkpoint(found.where, found.tensors)
    whole_or_not([model], lambda gate: install(model, layers, checkpoint, ImportedConfig))
    return model


def _check_foreign(found: Found, file: Path) -> None:
    """Raises UserError where a file is of a library that loads its own files: of ours, or of another with codes."""
    packed = next((name for name in found.tensors if name.endswith(PACKED)), None)
    if packed is None:
        return
    if recipe_in(file.parent) is not None:
        raise UserError(
            f"{file} is of a model that ptq4dm has quantized; load its folder, as ptq4dm.load_pipeline does."
        )
    raise UserError(
        f"{file} has codes in '{packed}', as ptq4dm, Nunchaku and others save theirs, each to be loaded by itself: a "
        "model of ptq4dm by its folder (ptq4dm.load_pipeline), a file of Nunchaku by ptq4dm.svdquant's functions."
    )


def read(file: Path) -> Found:
    """What a file holds, by its first bytes. Raises UserError."""
    return read_gguf(file) if is_gguf(file, ADVICE) else read_comfy(file)
