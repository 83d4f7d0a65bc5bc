"""Opening a pipeline: an embedded reference model, a local diffusers folder, or a hub id."""

from __future__ import annotations

import logging
import textwrap
import threading
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from . import pixel_dit  # noqa: F401  (makes PixelDiTPipeline known to DiffusionPipeline.from_pretrained)
from .embedded import asset_path
from .loading import loading

EMBEDDED = ("unet-cifar10", "dit-cifar10", "unet-cifar10-onestep")


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        UserError: the name is no device, or PyTorch sees no such device here.
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device '{device}' cannot be used here; try --device cpu.") from error
    return device


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
    handlers, here = logging.getLogger("diffusers").handlers[:], threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != here or _is_news(record)

    try:
        for handler in handlers:
            handler.addFilter(passes)
        # Weights come from safetensors only: unpickling a downloaded file would run its code.
        with loading():
            return DiffusionPipeline.from_pretrained(source, **{"dtype": dtype, "use_safetensors": True, **kw})
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **kw
) -> DiffusionPipeline:
    """Load a diffusers pipeline, quantized by ptq4dm or not, onto a device.

    Args:
        model: an embedded name (one of EMBEDDED), a local diffusers folder (with its model_index.json), or a hub
            id `owner/name`. A local folder of an embedded name goes by `./name`.
        dtype: what the floating-point weights are converted to, whatever they are stored in.
        kw: passed on to DiffusionPipeline.from_pretrained (revision, variant, ...).

    Raises:
        UserError: no such model, no pipeline in the folder, a broken weight file, or no such device.
    """
    device, name = check_device(device), str(model)
    folder = asset_path(name) if name in EMBEDDED else Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{folder} holds no model_index.json, so it is not a diffusers pipeline.")
        _check_weights(folder)
        source: str | Path = folder
    elif isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
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


def load_reference(
    name: str = "unet-cifar10", dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
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
