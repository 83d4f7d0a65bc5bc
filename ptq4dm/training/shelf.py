"""Pictures that have no room in memory: read when they are asked for, and kept as long as there is some."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..pipelines.picture_files import load_image
from .fitting import fitted

ROOM = 2**31  # bytes of pictures that stay in memory
READERS = 8  # threads: decoding a picture lets others run


class Shelf:
    """shelf[rows] -> uint8 [len(rows), C, H, W], as one tensor of all pictures would give it.

    Pictures are read by threads; the first ones stay, up to `room` bytes. A file that cannot be read is an error
    (UserError) when it is asked for.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], channels: int, room: int) -> None:
        self.paths, self.size, self.channels, self.room = list(paths), size, channels, room
        self.most = room // (channels * size[0] * size[1])
        self.kept: dict[int, Tensor] = {}
        self.coming: dict[int, Future[Tensor]] = {}
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="pictures")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.expect(rows)
        found = []
        for row in rows.tolist():
            if row not in self.kept:
                picture = self.coming[row].result()
                if len(self.kept) >= self.most:
                    found.append(picture)
                    continue
                self.kept[row] = picture
            found.append(self.kept[row])
        for row in rows.tolist():
            self.coming.pop(row, None)
        return torch.stack(found) if found else torch.empty(0, self.channels, *self.size, dtype=torch.uint8)

    def expect(self, rows: Tensor) -> None:
        """Begin to read what will be asked for next."""
        for row in rows.tolist():
            if row not in self.kept and row not in self.coming:
                self.coming[row] = self.readers.submit(self._read, row)

    def part(self, rows: Tensor) -> Shelf:
        """These pictures alone."""
        return Shelf([self.paths[row] for row in rows.tolist()], self.size, self.channels, self.room)

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def _read(self, row: int) -> Tensor:
        return fitted(load_image(self.paths[row]), self.size)[: self.channels].clone()
