"""Safetensors files of one network that are written while its tensors come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..files.tensors import write_tensors

LIMIT = 128 << 20  # bytes that are held before they are written
STEM = "diffusion_pytorch_model"


class Shards:
    """The files of one network in a folder, as diffusers names them. limit: bytes of tensors held in memory."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # names of the tensors of each
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors, wherever they lie."""
        for name, tensor in tensors.items():
            here = tensor.detach().cpu().contiguous()
            if self._held and sum(one.nbytes for one in self._held.values()) + here.nbytes > self.limit:
                self._write()
            self._held[name] = here
            self._bytes += here.nbytes

    def close(self) -> None:
        """Write what is left, give the files their names, and, where they are several, write their index."""
        self._write()
        count = len(self._files)
        numbered = [f"{STEM}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        names = numbered if count > 1 else [f"{STEM}.safetensors"]
        for number, name in enumerate(names):
            self._place(number).rename(self.folder / name)
        if count > 1:
            files = {tensor: name for name, held in zip(names, self._files, strict=True) for tensor in held}
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(files.items()))}
            (self.folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        write_tensors(self._place(len(self._files)), self._held, {"format": "pt"})
        self._files.append(list(self._held))
        self._held = {}

    def _place(self, number: int) -> Path:
        return self.folder / f"{STEM}.part{number}.safetensors"
