"""Opening a pipeline: an embedded reference model, a local diffusers folder, or a hub id."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..checks import checked
from ..errors import DamagedFile, UserError
from ..files.outside import naming, reason
from ..interrupts import unswallowed
from . import pixel_dit  # noqa: F401  (makes PixelDiTPipeline known to DiffusionPipeline.from_pretrained)
from .denoiser import networks_of
from .devices import check_device, dtype_of
from .embedded import EMBEDDED, check_name, folder_of
from .folder import INDEX, absent_parts, check_folder
from .loading import loading


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
        with loading(), unswallowed():
            return DiffusionPipeline.from_pretrained(source, **{"dtype": dtype, "use_safetensors": True, **kw})
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def _check_whole(pipe: DiffusionPipeline, source: str | Path) -> None:
    """Raises DamagedFile where a network got no values for some of its weights."""
    for name, network in networks_of(pipe).items():
        lacking = [key for key, tensor in network.state_dict().items() if tensor.is_meta]
        if lacking and not hasattr(network, "_hf_hook"):
            raise DamagedFile(
                f"{source}: '{name}' lacks {len(lacking)} of its tensors (first '{lacking[0]}'); its config.json and "
                "its weights are not of one model: copy or download it again."
            )


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
    folder = folder_of(model)
    _check_source(model, kw)
    source: str | Path = folder if folder.is_dir() else name
    if source is folder:
        kw = absent_parts(folder) | kw
    try:
        with naming(source):
            pipe = _open(source, dtype, **kw)
    except UserError:
        raise
    except Exception as error:  # whatever diffusers and transformers fail with on files that are not theirs
        if source is not folder:
            raise _not_given(name, error) from error
        raise DamagedFile(f"{folder} cannot be loaded: {reason(error)}.") from error
    if not {"device_map", "quantization_config"} & kw.keys():
        _check_whole(pipe, folder if source is folder else name)
    if hasattr(pipe, "unet"):  # convolutions run several times faster with channels innermost, on CPU and GPU
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe.to(device)


def check_loadable(model: str | os.PathLike) -> None:
    """Before the long work: look at all of a model that `load_pipeline` takes but the values of its tensors.

    Of a folder these are its configurations and the heads of its weight files; of a hub's model its model_index.json,
    which is downloaded where the cache has none. Raises UserError as `load_pipeline` does.
    """
    _check_source(model, {})
    if not folder_of(model).is_dir():
        try:
            DiffusionPipeline.load_config(os.fspath(model))
        except Exception as error:  # whatever the hub's library fails with
            raise _not_given(os.fspath(model), error) from error


def _check_source(model: str | os.PathLike, call: dict) -> None:
    """Raises UserError for what is no pipeline's folder, and could be no hub's model. call: as in `check_folder`."""
    folder = folder_of(model)
    if not folder.is_dir():
        check_name(model)
        return
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds no {INDEX}, so it is not a diffusers pipeline.")
    check_folder(folder, call)


def _not_given(name: str, error: Exception) -> UserError:
    what = f"there is no folder '{name}' here, and neither the hub nor its cache gave such a pipeline"
    return UserError(f"{what}: {reason(error)}.")


@checked
def load_reference(
    name: str = "unet-cifar10",
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | int = "cpu",
) -> DiffusionPipeline:
    """An embedded model of 32x32 CIFAR-10 images, stored in float16 and loaded as `dtype`.

    `unet-cifar10`: unconditional UNet (DDPMPipeline); `dit-cifar10`: class-conditional PixelDiTPipeline; both
    with a DDIMScheduler. `unet-cifar10-onestep`: that UNet distilled to one step, with its OneStepScheduler.
    `flow-dit-cifar10`: a small PixelDiTPipeline of flow matching, trained for guidance, too.

    Raises:
        UserError: the name is none of these.
    """
    if name not in EMBEDDED:
        raise UserError(f"no reference model is called '{name}'; choose from {', '.join(EMBEDDED)}.")
    return load_pipeline(name, dtype, device)
