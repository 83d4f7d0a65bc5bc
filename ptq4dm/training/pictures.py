"""The pictures of a folder as a model's training set: of its size, with the classes that sub-folders name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..pipelines.denoiser import denoiser
from ..pipelines.picture_files import find_images, load_image
from ..progress import progress_bar
from . import shelf
from .captions import read_captions
from .fitting import fitted


@dataclass
class Pictures:
    """images: uint8 [N, C, H, W] on the CPU, or a shelf that gives such where they have no room; labels: int64 [N],
    of classes or of texts, None where there are neither; texts: the captions that labels are the numbers of, the
    empty one first."""

    images: Tensor | shelf.Shelf
    labels: Tensor | None
    texts: list[str] | None = None

    def part(self, rows: Tensor) -> Pictures:
        images = self.images[rows] if isinstance(self.images, Tensor) else self.images.part(rows)
        return Pictures(images, None if self.labels is None else self.labels[rows], self.texts)

    def identity(self) -> list[int]:
        """What tells these pictures from others: their number, and the sum of their pixels, on a shelf of their bytes
        on disk."""
        if isinstance(self.images, Tensor):
            return [len(self), int(self.images.sum(dtype=torch.int64))]
        return [len(self), self.images.bytes_on_disk()]

    def __len__(self) -> int:
        return len(self.images)


def read_pictures(
    folder: str | os.PathLike, size: tuple[int, int], channels: int, classes: int | None, captions: bool = False
) -> Pictures:
    """All pictures under a folder, cut to the middle and scaled to size (height, width).

    They are read now and stay in memory, up to `shelf.ROOM` bytes in all; more are read as they are asked for.

    classes: of the model; then each of so many sub-folders holds the pictures of one, in the order of their names.
    captions: whether pictures have texts (captions.py).

    Raises:
        UserError: no pictures, other than so many sub-folders, pictures without captions, or one that cannot be read.
    """
    folder = Path(folder)
    found = find_images(folder)
    names = sorted({path.relative_to(folder).parts[0] for path in found.paths})
    if classes is not None:
        loose = [path for path in found.paths if len(path.relative_to(folder).parts) == 1]
        if loose or len(names) != classes:
            has = f"pictures beside them ({loose[0].name})" if loose else f"{len(names)}"
            raise UserError(
                f"the model knows {classes} classes, so {folder} needs {classes} sub-folders of pictures, one a "
                f"class in the order of their names; it has {has}."
            )
    told = read_captions(folder, found.paths) if captions else []
    images = _all(found.paths, size, channels)
    if captions:
        texts = ["", *sorted({*told} - {""})]
        numbers = {text: i for i, text in enumerate(texts)}
        return Pictures(images, torch.tensor([numbers[text] for text in told]), texts)
    labels = None
    if classes is not None:
        labels = torch.tensor([names.index(path.relative_to(folder).parts[0]) for path in found.paths])
    return Pictures(images, labels)


def _all(paths: list[Path], size: tuple[int, int], channels: int) -> Tensor | shelf.Shelf:
    if len(paths) * channels * size[0] * size[1] > shelf.ROOM:
        return shelf.Shelf(paths, size, channels, shelf.ROOM)
    images = torch.empty(len(paths), channels, *size, dtype=torch.uint8)
    for i, path in enumerate(progress_bar(paths, desc="pictures", unit="picture", leave=False)):
        images[i] = fitted(load_image(path), size)[:channels]
    return images


def split(pictures: Pictures, held_out: int) -> tuple[Pictures, Pictures]:
    """(trained on, held out): evenly spread ones, at most a tenth of all, are held out."""
    number = min(held_out, len(pictures) // 10)
    held = torch.arange(number) * len(pictures) // max(1, number)
    rest = torch.ones(len(pictures), dtype=torch.bool)
    rest[held] = False
    return pictures.part(rest.nonzero()[:, 0]), pictures.part(held)


def image_size(pipe: Any) -> tuple[int, int]:
    """(height, width) in pixels of what a pipeline makes when nobody says otherwise. Raises UserError."""
    size = getattr(denoiser(pipe).config, "sample_size", None)
    if size is None:
        raise UserError(f"{type(denoiser(pipe)).__name__} does not say the size of its images (sample_size).")
    height, width = (size, size) if isinstance(size, int) else size
    return height * (factor := _latent_factor(pipe)), width * factor


def _latent_factor(pipe: Any) -> int:
    """Pixels to a latent, along a side."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return 1
    own = getattr(pipe, "vae_scale_factor", None)  # not every pipeline has it
    return own if isinstance(own, int) else 2 ** (len(vae.config.block_out_channels) - 1)


def as_denoised(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents as a VAE gives them -> as the denoiser has them, float32."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor
