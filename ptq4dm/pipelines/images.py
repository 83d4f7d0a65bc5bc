"""Pictures out: float tensors, uint8 tensors, PNG files that carry their settings, grids. In: picture_files.py."""

from __future__ import annotations

import json
import os

import torch
from PIL import Image, PngImagePlugin

from ..checks import whole
from ..errors import UserError
from ..files.atomic import replacing
from ..files.outside import checked_object, parse_json
from ..files.pictures import check_picture, opened_picture
from .picture_files import list_images, load_images

__all__ = [
    "METADATA_KEY",
    "image_grid",
    "list_images",
    "load_images",
    "read_metadata",
    "save_picture",
    "save_png",
    "to_uint8",
]

METADATA_KEY = "ptq4dm"
MOST_PIXELS = 1 << 31  # of a grid, of 3 bytes each


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [N,3,H,W] in [0,1] -> uint8 of the same shape, on the same device.

    round(255 x) with halves to even, in float32: the arithmetic of diffusers' `numpy_to_pil`, so that a PNG
    saved here equals the one diffusers would save. Values outside [0,1] are clamped.

    Raises:
        UserError: the images are not floating point, or hold NaN.
    """
    if not images.is_floating_point():
        raise UserError(f"to_uint8 takes floating-point images in [0, 1], not {images.dtype}.")
    if images.isnan().any():
        raise UserError("the images hold NaN and cannot be turned into pictures.")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def save_picture(picture: Image.Image, path: str | os.PathLike, text: PngImagePlugin.PngInfo | None = None):
    """Write a PIL image as PNG under a temporary name, then rename: a killed run leaves no half picture.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary:  # its name keeps it out of list_images
        picture.save(temporary, format="PNG", pnginfo=text)


def save_png(image: torch.Tensor, path: str | os.PathLike, metadata: dict) -> None:
    """Write one uint8 [3,H,W] image as PNG, with `metadata` as JSON in the text chunk `ptq4dm`; atomic.

    Raises:
        UserError: the image is not uint8 [3,H,W], or the file cannot be written.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"save_png takes a uint8 [3,H,W] image, not {image.dtype} {list(image.shape)}.")
    text = PngImagePlugin.PngInfo()
    text.add_text(METADATA_KEY, json.dumps(metadata, sort_keys=True))
    save_picture(Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()), path, text)


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata that `save_png` put into a PNG.

    Raises:
        DamagedFile: the file cannot be read as an image, is cut short, or its checksums do not fit.
        UserError: it holds no `ptq4dm` text chunk, or something else than `save_png` writes.
    """
    check_picture(path)
    with opened_picture(path) as picture:
        text = picture.info.get(METADATA_KEY)
        if not isinstance(text, str):
            raise UserError(f"{path} carries no ptq4dm metadata: it was not made by ptq4dm generate.")
        return checked_object(parse_json(text), {})


def image_grid(images: torch.Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Lay uint8 [N,3,H,W] out row by row, `columns` wide, on white; nearest upscale by the integer `scale`.

    Raises:
        UserError: the images are not uint8 [N,3,H,W] with N > 0, or columns or scale is below 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        raise UserError(f"image_grid takes uint8 [N,3,H,W], N > 0, not {images.dtype} {list(images.shape)}.")
    columns, scale = whole(columns, "a grid's columns", 1), whole(scale, "a grid's scale", 1, 1_000_000)
    number, _, height, width = images.shape
    columns = min(columns, number)
    rows = -(-number // columns)
    if (pixels := rows * columns * height * width * scale**2) > MOST_PIXELS:
        raise UserError(
            f"a grid of {pixels:.3g} pixels does not fit a picture; take fewer images or a smaller scale."
        )
    cells = images.new_full((rows * columns, 3, height, width), 255)
    cells[:number] = images
    grid = cells.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, 3)
    grid = grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray(grid.cpu().numpy())
