"""Pictures of others: which files of a folder are pictures, and what 8-bit RGB pixels they hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import UserError
from ..files.claim import is_claim
from ..files.pictures import opened_picture
from ..kernels.runtime.atomic import SUFFIX

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
            if is_claim(path.name) or path.name.endswith(SUFFIX):
                continue  # of a run that writes here now, or was killed
            if path.name.startswith("."):
                hidden.append(path)
            elif os.path.isdir(path):  # of a link into what nobody may read, is_dir raises an error
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

    Grey levels of more than 8 bits are brought to 8 by their range, as the file says it; where it does not (floats,
    32 bits), the values must tell: to 1 (floats only), to 255, or from 4096 to 65535. Of a picture that moves, the
    first frame; an alpha channel is left out, as Pillow does.

    Raises:
        DamagedFile: the file cannot be read, or is too large.
        UserError: it holds numbers in no such range.
    """
    with opened_picture(path) as opened:
        grey = opened.mode == "F" or opened.mode.startswith("I")
        white, floats = _white(opened), opened.mode == "F"
        dark_is_high = _tag(opened, _PHOTOMETRIC, 1) == 0
        picture = ImageOps.exif_transpose(opened)
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")  # else Pillow leaves the transparency out
        pixels = np.asarray(picture if grey else picture.convert("RGB"))
    if grey:
        pixels = _eight_bits(pixels.astype(np.float64), path, white, floats)
        pixels = np.repeat((255 - pixels if dark_is_high else pixels)[..., None], 3, axis=2)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


# Numbers of TIFF's tags. Pillow reads them, and leaves grey levels of more than 8 bits as they are.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


def _white(opened: Image.Image) -> float | None:
    """The grey level that is white in a picture of more than 8 bits; None where its file does not say it."""
    bits, sample_format = _tag(opened, _BITS, 16), _tag(opened, _SAMPLE_FORMAT, 1)
    if opened.mode.startswith("I;16"):
        return 2.0**bits - 1
    if opened.mode == "I" and bits == 16 and sample_format == 2:  # signed
        return 32767.0
    return 65535.0 if opened.mode == "I" and opened.format in ("PNG", "PPM") else None


def _tag(opened: Image.Image, number: int, default: int) -> int:
    """A tag of a TIFF file, the first where there are several; `default` in other files."""
    return int(np.ravel(getattr(opened, "tag_v2", {}).get(number, default))[0])


def _eight_bits(values: np.ndarray, path, white: float | None, floats: bool) -> np.ndarray:
    """Grey levels [H, W] as uint8; where the format does not say what white is, the values must tell.

    Floats may be beyond black and white by a thousandth, as rounding and interpolation make them.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds NaN or infinity.")
    low, high = values.min(), values.max()
    if white is None:
        for first, last in ((0.0, 1.0), (16.0, 255.0), (4096.0, 65535.0)) if floats else ((0, 255), (4096, 65535)):
            if first <= high <= last * (1.001 if floats else 1):
                white = last
    if white is None or low < (-0.001 * white if floats else 0):
        raise UserError(
            f"{path} holds grey levels from {low:g} to {high:g}: nobody can say which is white; save it with 8 or 16 "
            "bits, or as floats from 0 to 1."
        )
    return (values * (255 / white)).round().clip(0, 255).astype(np.uint8)


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
