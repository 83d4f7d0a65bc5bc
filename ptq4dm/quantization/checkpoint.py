"""Blocks that are packed already, on disk, so that a long quantization that was interrupted goes on.

checkpoint.json            what is being made: plan, options, model, calibration
<block>.safetensors        the tensors of the block's layers, their completed plans in the header
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import UserError
from ..files.atomic import replacing
from ..layers.registry import FORMATS, empty_quantized

HEADER = "checkpoint.json"


def folder_of(checkpoint: str | os.PathLike | None, name: str, networks: Collection[str]) -> Path | None:
    """The folder that keeps one network's blocks: of several networks each has one of its own, by its name."""
    if checkpoint is None:
        return None
    return Path(checkpoint) / name if len(networks) > 1 else Path(checkpoint)


def check_folder(folder: Path) -> None:
    """Before the long work: raises UserError where a folder cannot hold a checkpoint, or those of several networks.

    Nothing is made.
    """
    if folder.is_dir() and not _holds_blocks(folder) and not all(map(_holds_blocks, folder.iterdir())):
        raise UserError(f"{folder} holds other files; give a folder of its own to a checkpoint.")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot make the folder {folder}: {there} is a file.")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write into {folder}; give another folder.")


def _holds_blocks(path: Path) -> bool:
    return (path / HEADER).exists()


class BlockCheckpoint:
    """A folder of packed blocks.

    Raises UserError where the folder cannot be made, or holds the blocks of another quantization.
    """

    def __init__(self, folder: Path, identity: dict):
        check_folder(folder)
        self.folder, header = folder, folder / HEADER
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror or error}.") from None
        if header.exists():
            try:
                same = json.loads(header.read_text()) == identity
            except (OSError, ValueError):
                same = False
            if not same:
                raise UserError(
                    f"{folder} holds the blocks of another quantization (plan, options, model or calibration "
                    "differ); give another folder or delete it."
                )
        else:
            with replacing(header) as temporary:
                temporary.write_text(json.dumps(identity))

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def save(self, block: str, layers: dict[str, nn.Module]) -> None:
        """Keep the layers of a block."""
        tensors = {
            f"{name}|{key}": tensor.detach().cpu().contiguous()
            for name, layer in layers.items()
            for key, tensor in layer.state_dict().items()
        }
        about = {
            name: {"plan": asdict(one.plan), "stages": getattr(one, "stages", {})} for name, one in layers.items()
        }
        with replacing(self._path(block)) as temporary:
            save_file(tensors, temporary, {"layers": json.dumps(about)})

    def load(self, block: str, model: nn.Module) -> dict[str, nn.Module] | None:
        """The layers of a block by name; None if it is not there yet. Raises UserError for a damaged file."""
        path = self._path(block)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["layers"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: _layer(model.get_submodule(name), name, one, tensors) for name, one in about.items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and its block is packed again.") from None


def _layer(module: nn.Module, name: str, about: dict, tensors: dict) -> nn.Module:
    plan = FORMATS.find(about["plan"]["format"]).plan(**about["plan"])
    layer = empty_quantized(module, plan, module.weight.device)
    own = {key.partition("|")[2]: value for key, value in tensors.items() if key.partition("|")[0] == name}
    for key, value in own.items():
        setattr(layer, key, nn.Parameter(value.to(module.weight.device), requires_grad=False))
    if set(own) != set(layer.state_dict()):
        raise KeyError(f"tensors of '{name}'")
    if about["stages"]:
        layer.stages = about["stages"]
    return layer.train(module.training)
