"""Writing a quantized model as a safetensors file of ComfyUI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checks import checked
from ..errors import UserError
from ..files.gguf import GGUFFile, is_gguf
from ..files.outside import read_tensors
from ..files.places import file_place
from ..files.tensors import write_tensors
from ..layers.base import is_quantized
from ..quantization.components import component_of
from ..quantization.refusals import check_saving
from .comfy import ADVICE, CONFIG, OLD, SCALED
from .names import in_names_of_file
from .rows import PREFIXES, Rows
from .written import stored, written

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MARK = {"written_by": "ptq4dm"}  # in the header of what is written: a later export may replace it
BESIDE = (CONFIG, *OLD, *OLD.values(), ".weight_scale_2", ".weight_zeros", ".weight_s_rel", ".weight_s_channel")


@checked
@torch.no_grad()
def export_comfy(
    target: DiffusionPipeline | nn.Module,
    file: str | os.PathLike,
    names: str | os.PathLike | None = None,
    component: str | None = None,
) -> list[str]:
    """Write the denoiser of a pipeline, or a model, as one safetensors file that ComfyUI loads.

    Args:
        target: Linear layers in formats that ComfyUI has, which interchange/README.md lists, or in full precision.
            Quantized convolutions, of which its files know none, are written as the floats that they stand for.
        file: what is written, whole or not at all. An earlier export is replaced; another file is refused.
        names: a file of the same architecture in the names that ComfyUI knows, safetensors or GGUF, of any precision:
            only names and shapes are read. The result has these names, with q, k and v joined as they are there.
            Without it names are those of the model.
        component: which network of the pipeline, its denoiser if not given.

    Returns:
        The names of the convolutions that were written as floats.

    Raises:
        UserError: nothing is quantized, or convolutions alone; a Linear layer that no format of ComfyUI holds, by
            name; layers of several formats that `names` joins. Nothing is written then.
    """
    model = component_of(target, component)
    layers = {name: one for name, one in model.named_modules() if is_quantized(one)}
    if not layers:
        raise UserError(f"the {type(model).__name__} has no quantized layers; quantize it first.")
    check_saving(model, layers)
    check_export(file)
    as_floats = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    weights = {f"{name}.weight": _written(name, one) for name, one in layers.items() if name not in as_floats}
    if not weights:
        raise UserError(
            f"of the {type(model).__name__} convolutions alone are quantized, which ComfyUI's files hold as floats."
        )
    plain = _floats(model, tuple(f"{name}." for name in layers))
    plain |= {f"{name}.weight": _dequantized(layers[name]) for name in as_floats}
    if names is not None:
        twin = {**plain, **{name: torch.empty(rows.outputs, 1, device="meta") for name, rows in weights.items()}}
        made = in_names_of_file(model, twin, outputs_in(Path(names).expanduser()), str(names))
        weights, plain = _joined(made, weights, plain)
    tensors = dict(plain)
    for name, rows in weights.items():
        try:
            found = stored(rows)
        except ValueError as error:
            raise UserError(f"'{name}' {error}.") from None
        stem = name.removesuffix("weight")
        tensors |= {stem + end: one.contiguous() for end, one in found.items()}
    write_tensors(file, tensors, {"format": "pt", **MARK})
    return as_floats


def check_export(file: str | os.PathLike) -> None:
    """Raises UserError where a file cannot be written, or one is there that no export wrote."""
    file_place(file, ".safetensors")
    if not os.path.isfile(file) or not os.path.getsize(file):
        return
    try:
        ours = read_tensors(file, lambda opened: MARK.items() <= opened.header.items())
    except UserError:  # no safetensors file at all
        ours = False
    if not ours:
        raise UserError(f"{file} is there, and no export of ptq4dm wrote it; give another name, or move it away.")


def outputs_in(file: Path) -> dict[str, int]:
    """Names of a file's tensors, without prefix and without scales beside weights -> rows of each."""
    if is_gguf(file, ADVICE):
        shapes = {name: one.shape for name, one in GGUFFile(file).tensors.items()}
    else:
        shapes = read_tensors(file, lambda opened: {name: opened.shape(name) for name in opened.names}, ADVICE)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in shapes):
            shapes = {name.removeprefix(prefix): one for name, one in shapes.items() if name.startswith(prefix)}
            break
    named = {name: one for name, one in shapes.items() if not name.endswith(BESIDE) and name != SCALED}
    return {name: shape[0] if shape else 1 for name, shape in named.items()}


def _written(name: str, layer: nn.Module) -> Rows:
    try:
        return written(layer)
    except ValueError as error:
        raise UserError(f"layer '{name}' {error}.") from None


def _dequantized(layer: nn.Module) -> Tensor:
    """The weight that a layer's codes stand for, in the model's dtype."""
    return layer.dequantized_weight().to(layer.model_dtype).cpu().contiguous()


def _floats(model: nn.Module, replaced: tuple[str, ...]) -> dict[str, Tensor]:
    """All saved tensors that are not of quantized layers, and the biases of these."""
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(replaced) or name.endswith(".bias"):
            found[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return found


def _joined(
    made: dict[str, list[tuple[str, Tensor]]], weights: dict[str, Rows], plain: dict[str, Tensor]
) -> tuple[dict[str, Rows], dict[str, Tensor]]:
    """Weights and floats by the names of a file. Raises UserError where what it joins does not go together."""
    joined: dict[str, Rows] = {}
    floats: dict[str, Tensor] = {}
    for name, parts in made.items():
        if all(one in plain for one, _ in parts):
            floats[name] = torch.cat([plain[one][rows] for one, rows in parts])
            continue
        if lone := [one for one, _ in parts if one in plain]:
            other = next(one for one, _ in parts if one in weights)
            raise UserError(f"'{lone[0]}' is in full precision, and '{other}', which '{name}' holds too, is not.")
        try:
            joined[name] = Rows.joined([weights[one].pick(rows) for one, rows in parts])
        except ValueError as error:
            raise UserError(f"'{name}' cannot be written: {error}.") from None
    return joined, floats
