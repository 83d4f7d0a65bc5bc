"""CRC-32 of tensors and files: it finds what no look at the values can, a flipped bit or another run's rows."""

from __future__ import annotations

import os
import zlib
from typing import Any

import torch
from torch import Tensor

PIECE = 16 << 20  # bytes of a file that are read at once
OF_NUMPY = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32}


def checksum(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's values in order, as they lie in memory on this machine; goes on from `start`."""
    return zlib.crc32(_bytes(tensor), start) if tensor.numel() else start


def checksums(tensor: Tensor) -> list[int]:
    """The checksum of each row of a tensor [N, ...]."""
    return [checksum(row) for row in tensor]


def file_checksum(path: str | os.PathLike) -> int:
    """CRC-32 of a file's bytes. Raises OSError where it cannot be read."""
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            found = zlib.crc32(piece, found)
    return found


def _bytes(tensor: Tensor) -> Any:
    """A tensor's values as a buffer, by the shortest way: a model has hundreds of them."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.numpy() if tensor.dtype in OF_NUMPY else tensor.reshape(-1).view(torch.uint8).numpy()
