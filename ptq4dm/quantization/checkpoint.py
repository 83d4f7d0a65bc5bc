"""Blocks that are packed already, on disk, so that a long quantization that was interrupted goes on.

checkpoint.json            what is being made: plan, options, model, calibration
<block>.safetensors        the tensors of the block's layers, their completed plans in the header
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import nn

from ..errors import DamagedFile, UserError
from ..files.atomic import replacing
from ..files.claim import claimed, is_claim
from ..files.outside import TensorFile, checked_object, read_json, read_tensors, reason
from ..files.places import output_folder
from ..files.tensors import write_tensors
from ..kernels.runtime.atomic import SUFFIX
from ..layers.choices import check_choices, check_fit, choices_of
from ..layers.registry import empty_quantized
from ..layers.stored import check_stored
from .checksums import checksum

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
    if (
        folder.is_dir()
        and not _holds_blocks(folder)
        and not all(map(_only_blocks, folder.iterdir()))
        and not _holds_blocks(folder)  # another run may have made it meanwhile
    ):
        raise UserError(f"{folder} holds other files; give a folder of its own to a checkpoint.")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot make the folder {folder}: {there} is a file.")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write into {folder}; give another folder.")


def _holds_blocks(path: Path) -> bool:
    return (path / HEADER).exists()


def _only_blocks(path: Path) -> bool:
    """Whether this is of a checkpoint: the blocks of a network, or what was killed before it had its header."""
    left = path.name.startswith(f".{HEADER}.") and path.name.endswith(SUFFIX)
    return (
        left
        or is_claim(path.name)
        or _holds_blocks(path)
        or (path.is_dir() and all(map(_only_blocks, path.iterdir())))
    )


@contextmanager
def block_checkpoint(folder: Path, identity: dict) -> Iterator[BlockCheckpoint]:
    """A folder of packed blocks, while one run works with it: a second one of the same quantization waits.

    Raises UserError where the folder cannot be made, or is of another quantization.
    """
    check_folder(folder)
    with output_folder(folder), claimed(folder, identity):
        yield BlockCheckpoint(folder, identity)


class BlockCheckpoint:
    """A folder of packed blocks.

    Raises UserError where it holds the blocks of another quantization.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder, header = folder, folder / HEADER
        folder.mkdir(parents=True, exist_ok=True)
        if header.exists():
            if read_json(header, "delete the folder, or give another") != identity:
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
        header = {"layers": json.dumps(about), "checksum": str(checksum(tensors, tensors))}
        write_tensors(self._path(block), tensors, header)

    def load(self, block: str, model: nn.Module) -> dict[str, nn.Module] | None:
        """The layers of a block by name; None if it is not there yet. Raises DamagedFile for a damaged file."""
        path = self._path(block)
        if not path.exists():
            return None

        def layers(file: TensorFile) -> dict[str, nn.Module]:
            about, tensors = checked_object(file.json("layers"), {}), file.tensors()
            if file.header.get("checksum", "none") not in ("none", str(checksum(tensors, tensors))):
                raise ValueError("it is not as it was saved: its checksum differs")
            if strange := sorted(key for key in tensors if key.partition("|")[0] not in about):
                raise ValueError(f"no layer has '{strange[0]}'")
            return {name: _layer(model.get_submodule(name), name, one, tensors) for name, one in about.items()}

        advice = "delete it, and its block is packed again"
        with _telling(path, advice):
            return read_tensors(path, layers, advice)


@contextmanager
def _telling(path: Path, advice: str) -> Iterator[None]:
    """Say the file and the way out in UserErrors of what is in it, too."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise DamagedFile(text if str(path) in text else f"{path} is damaged ({reason(error)}); {advice}.") from None


def _layer(module: nn.Module, name: str, about: dict, tensors: dict) -> nn.Module:
    checked_object(about, {"plan": dict, "stages": dict})
    plan = choices_of(name, about["plan"])
    check_choices(name, plan)
    check_fit(name, plan, module)
    layer = empty_quantized(module, plan, module.weight.device)
    own = {key.partition("|")[2]: value for key, value in tensors.items() if key.partition("|")[0] == name}
    check_stored(layer, own, prefix=f"{name}.")
    for key, value in own.items():
        setattr(layer, key, nn.Parameter(value.to(module.weight.device), requires_grad=False))
    if about["stages"]:
        layer.stages = about["stages"]
    return layer.train(module.training)
