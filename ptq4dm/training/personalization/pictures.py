"""The user's images as what a model denoises: pixels, or latents of its VAE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...pipelines.denoiser import denoiser
from ...pipelines.picture_files import list_images, load_image
from ..fitting import fitted
from ..pictures import as_denoised, image_size

MOST = 10_000  # images; each is kept as latents or pixels


def pictures_of(images: str | os.PathLike | Sequence[str | os.PathLike] | Tensor) -> list[Tensor]:
    """uint8 [3, H, W] each, from a folder, from paths, or from a tensor uint8 [N, 3, H, W].

    Raises UserError where there are none, too many, or one that cannot be read, and for a folder of several folders
    of images, as of classes: they are of one thing.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images as a tensor are uint8 [N, 3, H, W]; got {images.dtype} {list(images.shape)}.")
        found = list(images.cpu())
    else:
        paths = _of_one_folder(images) if isinstance(images, (str, os.PathLike)) else list(images)
        if len(paths) > MOST:
            raise UserError(f"{len(paths)} images are more than the {MOST} that are looked at; give fewer.")
        found = [load_image(path) for path in paths]
    if not found:
        raise UserError("there are no images to learn from.")
    return found


def _of_one_folder(folder: str | os.PathLike) -> list[Path]:
    paths = list_images(folder)
    parents = sorted({str(path.parent) for path in paths})
    if len(parents) > 1:
        raise UserError(
            f"{os.fspath(folder)} has images in {len(parents)} folders, such as {parents[0]} and {parents[1]}, and "
            "what is learned is of one; give that folder, or a list of paths."
        )
    return paths


@torch.no_grad()
def learned_from(pipe, pictures: Sequence[Tensor]) -> Tensor:
    """Pictures, cut to the middle and resized to the model's size, as it denoises them: float32 [N, C, H, W].

    Latents are the means that the VAE gives (the paper draws from its distribution; with the few images there are,
    noise on top of the schedule's would only blur them, our assumption).
    """
    height, width = image_size(pipe)
    model = denoiser(pipe)
    pixels = torch.stack([fitted(one, (height, width)) for one in pictures]).float() / 127.5 - 1
    vae = getattr(pipe, "vae", None)
    if vae is None:
        if model.config.in_channels == 1:
            pixels = pixels.mean(1, keepdim=True)
        return pixels.to(pipe._execution_device)
    return torch.cat([_latent(pipe, vae, one[None]) for one in pixels])


def _latent(pipe, vae: nn.Module, pixels: Tensor) -> Tensor:
    encoded = vae.encode(pixels.to(pipe._execution_device, vae.dtype))
    if not hasattr(encoded, "latent_dist"):
        raise UserError(f"{type(vae).__name__} gives no distribution of latents, as AutoencoderKL does.")
    return as_denoised(vae, encoded.latent_dist.mode())
