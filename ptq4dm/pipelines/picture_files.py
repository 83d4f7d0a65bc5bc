"""Pictures of others: which files of a folder are pictures, and what 8-bit RGB pixels they hold."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SUFFIXES |= {".pbm", ".pgm", ".ppm", ".pnm", ".avif"}


@dataclass(frozen=True)
class PictureFiles:
    """The pictures of a folder, sorted by path, and how many other files lie there."""

    folder: Path
    paths: list[Path]
    hidden: int  # files and folders whose names begin with a dot
    others: int  # files with other suffixes, links to nothing

    @property
    def passed_over(self) -> str:
        """A clause on what was not taken, empty where nothing was."""
        counted = ((self.others, "not pictures by their suffix"), (self.hidden, "hidden"))
        told = " and ".join(f"{number} {what}" for number, what in counted if number)
        return f"{self.folder}: {told}, passed over" if told else ""


def find_images(folder: str | os.PathLike) -> PictureFiles:
    """The pictures under `folder`, sub-folders and links to folders included, whatever the case of their suffixes.

    Raises:
        UserError: the folder does not exist, is a file, cannot be read, or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of images.")
    paths: list[Path] = []
    others: list[Path] = []
    hidden: list[Path] = []

    def walk(place: Path, above: frozenset[str]) -> None:
        above |= {os.path.realpath(place)}
        try:
            inside = list(place.iterdir())
        except OSError as error:
            raise UserError(f"the folder {place} cannot be read: {error.strerror}.") from error
        for path in inside:
            if path.name.startswith("."):
                hidden.append(path)
            elif path.is_dir():
                if os.path.realpath(path) not in above:  # a link may lead back to a folder that it lies in
                    walk(path, above)
            elif path.suffix.lower() in SUFFIXES and path.is_file():
                paths.append(path)
            else:
                others.append(path)

    walk(folder, frozenset())
    if not paths:
        raise UserError(f"{folder} holds no images (looked for {', '.join(sorted(SUFFIXES))}).")
    return PictureFiles(folder, sorted(paths), len(hidden), len(others))


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The paths of `find_images`."""
    return find_images(folder).paths


def load_image(path: str | os.PathLike) -> torch.Tensor:
    """One picture as it is meant to be looked at: RGB, uint8 [3, H, W], turned as its EXIF data says.

    Grey levels of 16 bits and of floats are brought to 8 bits by their range (65535; 1, 255 or 65535); of a picture
    that moves, the first frame; an alpha channel is left out, as Pillow does.

    Raises:
        UserError: the file cannot be read, or holds numbers in no such range.
    """
    try:
        with Image.open(path) as opened:
            mode, kind = opened.mode, opened.format
            picture = ImageOps.exif_transpose(opened)
            grey = mode == "F" or mode.startswith("I")
            pixels = np.asarray(picture if grey else picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read as an image: {error}.") from error  # SyntaxError: of a broken PNG
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large to be read as an image: {error}") from error
    if grey:
        sixteen = mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM"))
        pixels = _eight_bits(pixels.astype(np.float64), path, 65535.0 if sixteen else None, floats=mode == "F")
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def _eight_bits(values: np.ndarray, path, white: float | None, floats: bool) -> np.ndarray:
    """Grey levels [H, W] as uint8; where the format does not say what white is, the values must tell."""
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinity.")
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise UserError(
            f"{path} holds grey levels from {low:g} to {high:g}: nobody can say which is white; save it with 8 or 16 "
            "bits, or as floats from 0 to 1."
        )
    if white is None:
        white = 1.0 if floats and high <= 1 else 255.0 if high <= 255 else 65535.0
    return (values * (255 / white)).round().astype(np.uint8)


def load_images(paths: Sequence[str | os.PathLike]) -> torch.Tensor:
    """Read images of one size, each by `load_image`: uint8 [N,3,H,W] on the CPU.

    Raises:
        UserError: no paths, a file that cannot be read, or a size that differs from the first image's.
    """
    if not paths:
        raise UserError("there are no images to load.")
    images: list[torch.Tensor] = []
    for path in paths:
        image = load_image(path)
        if images and image.shape != images[0].shape:
            (_, h, w), (_, h0, w0) = image.shape, images[0].shape
            raise UserError(f"{path} is {w}x{h} but {paths[0]} is {w0}x{h0}; images must share one size.")
        images.append(image)
    return torch.stack(images)
