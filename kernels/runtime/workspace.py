"""Room for what the launches of one call hand to one another: one allocation, cut by addresses.

Kernels need addresses alone. Made as tensors, each of these would take the host as long as a launch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes; of the buffer at least 16, as of any tensor that is allocated


@dataclass(frozen=True, eq=False)
class Layout:
    """Place and form of a contiguous tensor that begins `offset` bytes into a buffer."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @functools.cached_property
    def flat(self) -> Layout:
        return Layout(self.offset, (math.prod(self.shape),), (1,), self.dtype)


class Piece:
    """Stands for a tensor in a buffer where a `Launch` takes one; it keeps the buffer alive."""

    __slots__ = ("address", "buffer", "layout")

    def __init__(self, buffer: Tensor, address: int, layout: Layout):
        self.buffer, self.address, self.layout = buffer, address, layout

    dtype = property(lambda self: self.layout.dtype)
    shape = property(lambda self: self.layout.shape)

    def data_ptr(self) -> int:
        return self.address

    def stride(self, axis: int | None = None):
        return self.layout.strides if axis is None else self.layout.strides[axis]

    def flatten(self) -> Piece:
        return Piece(self.buffer, self.address, self.layout.flat)

    def tensor(self) -> Tensor:
        layout = self.layout
        size = math.prod(layout.shape) * layout.dtype.itemsize
        return self.buffer[layout.offset : layout.offset + size].view(layout.dtype).view(layout.shape)


class Workspace:
    """For contiguous tensors of these (shape, dtype)."""

    def __init__(self, *wanted: tuple[tuple[int, ...], torch.dtype]):
        self.layouts, self.bytes = [], 0
        for shape, dtype in wanted:
            strides = tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))
            self.layouts.append(Layout(self.bytes, shape, strides, dtype))
            self.bytes += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def take(self, like: Tensor) -> list[Piece]:
        """Uninitialized pieces in a new buffer beside `like`."""
        buffer = like.new_empty(self.bytes, dtype=torch.uint8)
        start = buffer.data_ptr()
        return [Piece(buffer, start + layout.offset, layout) for layout in self.layouts]
