"""Opening a pipeline: an embedded reference model, a local diffusers folder, or a hub id."""

from __future__ import annotations

import logging
import os
import textwrap
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from ..checks import checked
from ..errors import UserError
from . import pixel_dit  # noqa: F401  (makes PixelDiTPipeline known to DiffusionPipeline.from_pretrained)
from .devices import check_device, dtype_of
from .embedded import asset_path

EMBEDDED = ("unet-cifar10", "dit-cifar10", "unet-cifar10-onestep")


def _check_weights(folder: Path) -> None:
    """Open the header of every safetensors file, so that a truncated one or an LFS pointer is named."""
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file; copy or download it again.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0].rstrip("."), 200, placeholder=" ...")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("An error occurred while trying", "Couldn't connect to the Hub"))


def _open(source: str | Path, dtype: torch.dtype, **kw) -> DiffusionPipeline:
    # diffusers logs a failure and then raises it too; the caller's one sentence is enough.
    handlers = logging.getLogger("diffusers").handlers[:]
    for handler in handlers:
        handler.addFilter(_is_news)
    try:
        # Weights come from safetensors only: unpickling a downloaded file would run its code.
        return DiffusionPipeline.from_pretrained(source, **{"dtype": dtype, "use_safetensors": True, **kw})
    finally:
        for handler in handlers:
            handler.removeFilter(_is_news)


@checked
def load_pipeline(
    model: str | os.PathLike,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | int = "cpu",
    **kw,
) -> DiffusionPipeline:
    """Load a diffusers pipeline, quantized by ptq4dm or not, onto a device.

    Args:
        model: an embedded name (one of EMBEDDED), a local diffusers folder (with its model_index.json), or a hub
            id `owner/name`. A local folder of an embedded name goes by `./name`.
        dtype: float32, bfloat16 or float16, also by name: what the floating-point weights are converted to,
            whatever they are stored in.
        device: "cpu", "cuda:1", a torch.device, or the number of a GPU.
        kw: passed on to DiffusionPipeline.from_pretrained (revision, variant, ...).

    Raises:
        UserError: no such model, no pipeline in the folder, a broken weight file, or no such device.
    """
    device, name = check_device(device), os.fspath(model)
    dtype = dtype_of(kw.pop("torch_dtype", dtype))  # diffusers' older name for it
    folder = asset_path(name) if name in EMBEDDED else Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{folder} holds no model_index.json, so it is not a diffusers pipeline.")
        _check_weights(folder)
        source: str | Path = folder
    elif not isinstance(model, str) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"'{name}' is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder here, "
            "nor a hub id (owner/name)."
        )
    else:
        source = name
    try:
        pipe = _open(source, dtype, **kw)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        if source is name:
            raise UserError(
                f"there is no folder '{name}' here, and neither the hub nor its cache gave such a pipeline: "
                f"{_first_line(error)}."
            ) from error
        raise UserError(f"{folder} cannot be loaded: {_first_line(error)}.") from error
    if hasattr(pipe, "unet"):  # convolutions run several times faster with channels innermost, on CPU and GPU
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe.to(device)


@checked
def load_reference(
    name: str = "unet-cifar10",
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | int = "cpu",
) -> DiffusionPipeline:
    """An embedded model of 32x32 CIFAR-10 images, stored in float16 and loaded as `dtype`.

    `unet-cifar10`: unconditional UNet (DDPMPipeline); `dit-cifar10`: class-conditional PixelDiTPipeline; both
    with a DDIMScheduler. `unet-cifar10-onestep`: that UNet distilled to one step, with its OneStepScheduler.

    Raises:
        UserError: the name is none of these.
    """
    if name not in EMBEDDED:
        raise UserError(f"no reference model is called '{name}'; choose from {', '.join(EMBEDDED)}.")
    return load_pipeline(name, dtype, device)
