"""Putting a checkpoint of 4-bit layers into a model: files -> tensors -> layers and all the rest, or nothing.

A loader takes the tensors of its layers out of the checkpoint one by one; what is left over must be just the model's
other tensors. Only then is the model touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ...errors import DamagedFile, UserError
from ...files import outside
from ...files.outside import read_tensors
from ...layers.base import replace_module
from ...layers.plan import Plan
from ...layers.stored import check_numbers
from ...quantization.diffusers_bridge import mark_quantized
from ...quantization.packing import link_layers
from ...quantization.recipe import QuantConfig, register

FLOAT16S = (torch.bfloat16, torch.float16)


@register("nunchaku")
@dataclass(repr=False)
class NunchakuConfig(QuantConfig):
    """Mark of a model whose layers came from a checkpoint of Nunchaku's; it cannot quantize anything itself."""

    packs_while_loading: ClassVar[bool] = False
    loaded_only: ClassVar[bool] = True

    def resolve(self, model, views, store):
        raise UserError("the method 'nunchaku' stands for layers read from a checkpoint; quantize with svdquant.")


@dataclass
class Checkpoint:
    """Named tensors, and how messages call the file or folder they came from."""

    where: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    halves: dict[str, torch.dtype] = field(default_factory=dict)  # layer -> the dtype of its numbers of 16 bits

    def take(self, key: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Remove a tensor. Raises UserError, naming the key, where it is missing or has another shape or dtype."""
        if key not in self.tensors:
            raise UserError(f"{self.where} lacks '{key}': it is incomplete or of another model.")
        tensor = self.tensors[key]
        if tensor.shape != shape:
            raise UserError(f"'{key}' of {self.where} has shape {list(tensor.shape)}, the model needs {list(shape)}.")
        if tensor.dtype not in dtypes:
            wanted = " or ".join(_short(dtype) for dtype in dtypes)
            raise UserError(f"'{key}' of {self.where} has dtype {_short(tensor.dtype)}; it should be {wanted}.")
        if tensor.dtype in FLOAT16S and tensor.dtype != self.halves.setdefault(key.rpartition(".")[0], tensor.dtype):
            raise UserError(f"'{key}' of {self.where} is {_short(tensor.dtype)}, and others of its layer are not.")
        if tensor.is_floating_point():
            with outside.outside(self.where):
                check_numbers(tensor, key, above_zero=key.endswith(".wscales") and tensor.dtype in FLOAT16S)
                if key.endswith(".smooth_factor") and not bool((tensor != 0).all()):
                    raise ValueError(f"'{key}' holds 0, and inputs are divided by it")
        return self.tensors.pop(key)


def read_files(where: Path, files: list[Path]) -> Checkpoint:
    """All tensors of safetensors files; the metadata of the last. Raises UserError for a file that is not whole."""
    checkpoint = Checkpoint(str(where), {})
    for path in files:
        try:
            found, header = read_tensors(path, lambda file: (file.tensors(), file.header))
        except DamagedFile as error:
            raise DamagedFile(f"{path} is not a whole safetensors file; copy or download it again.") from error
        if twice := sorted(found.keys() & checkpoint.tensors.keys()):
            raise DamagedFile(f"two files of {where} hold '{twice[0]}'; copy or download them again.")
        checkpoint.tensors |= found
        checkpoint.metadata = header
    return checkpoint


def read_json(text: str | Path, what: str) -> dict:
    """A JSON object from its text or its file. Raises UserError, calling it `what`."""
    with outside.outside(what):
        if isinstance(text, Path) and not text.is_file():
            raise ValueError("there is no such file")
        data = outside.read_json(text) if isinstance(text, Path) else outside.parse_json(text)
        return outside.checked_object(data, {})


def empty_model(kind: type[nn.Module], config: dict, dtype: torch.dtype) -> nn.Module:
    """A diffusers model of a config, its parameters on meta in `dtype`, for `install` to fill; in evaluation mode.

    For who is `loading`: the default dtype is the process's.
    """
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(config)
    except Exception as error:  # a model's constructor fails in every way on a config that is not its own
        raise DamagedFile(f"no {kind.__name__} can be made of this config: {outside.reason(error)}.") from error
    finally:
        torch.set_default_dtype(before)
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if exact & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.eval()


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear to be replaced. Raises UserError where the model has none of that name."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"the model has no layer '{name}': the checkpoint is of another model.") from None
    if type(linear) is not nn.Linear:
        raise UserError(f"'{name}' is {type(linear).__name__}, no Linear in full precision; load into a new model.")
    return linear


@torch.no_grad()
def install(
    model: nn.Module, layers: dict[str, nn.Module], checkpoint: Checkpoint, kind: type[QuantConfig] = NunchakuConfig
) -> None:
    """Put layers in the places they are named for, what is left of the checkpoint into the model's other tensors, and
    a config of this kind with their plans into the model's config.

    Raises UserError, naming the key, where a tensor is missing, left over or of another shape, before it changes
    anything.
    """
    saved, buffers = model.state_dict(), dict(model.named_buffers())
    replaced = tuple(f"{name}." for name in layers)
    wanted = {
        name: tensor
        for name, tensor in [*model.named_parameters(), *buffers.items()]
        if name in saved and not name.startswith(replaced)
    }
    values = {name: checkpoint.take(name, tensor.shape, _kin(tensor)) for name, tensor in wanted.items()}
    # Files may hold tied parameters twice, and buffers that a model makes itself: diffusers' strict check wants them.
    known = {name for name in [*saved, *buffers] if not name.startswith(replaced)}
    if left := sorted(set(checkpoint.tensors) - known):
        raise UserError(f"{checkpoint.where} holds {len(left)} tensors that the model has not (first '{left[0]}').")
    for name, layer in layers.items():
        replace_module(model, name, layer)
    values = {name: value.to(wanted[name].dtype) for name, value in values.items()}
    model.load_state_dict(values, strict=False, assign=any(tensor.is_meta for tensor in wanted.values()))
    plan = Plan(kind.method, {name: layer.plan for name, layer in layers.items()})
    config = kind(plan=plan)
    link_layers(model.get_submodule, plan.layers)
    mark_quantized(model, config)


def _kin(tensor: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that a tensor's values may be stored in."""
    floats = (torch.float32, *FLOAT16S, torch.float64)
    return floats if tensor.is_floating_point() else (tensor.dtype,)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
