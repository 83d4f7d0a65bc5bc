"""CRC-32 of tensors: it finds what no look at the values can, a flipped bit or another run's rows."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def checksum(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's values in order, as they lie in memory on this machine; goes on from `start`."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy(), start) if data.numel() else start


def checksums(tensor: Tensor) -> list[int]:
    """The checksum of each row of a tensor [N, ...]."""
    return [checksum(row) for row in tensor]
