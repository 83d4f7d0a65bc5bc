"""GGUF files, of llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF; what lies in their blocks: interchange/gguf.py.

    "GGUF", u32 version, u64 tensors, u64 entries;      all little-endian
    an entry: string name, u32 type, value;             a string: u64 length, UTF-8 bytes
    a tensor: string name, u32 dimensions, u64 each, the fastest first, u32 type, u64 offset
    padding to `general.alignment` (32), then the tensors' bytes, each at its offset from here

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .outside import outside

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 8
ALIGNMENT = "general.alignment"
MAGIC = b"GGUF"


@dataclass(frozen=True)
class GGUFTensor:
    """shape: slowest dimension first, as torch has it. kind: the number of its type. start: its first byte of the
    file."""

    shape: tuple[int, ...]
    kind: int
    start: int


def is_gguf(path: str | os.PathLike, advice: str = "") -> bool:
    """Whether a file begins as GGUF files do, and not as those of safetensors: u64 length, "{".

    Raises DamagedFile where it cannot be read, or begins as neither.
    """
    with outside(path, advice), open(path, "rb") as file:
        first = file.read(9)
        if first[:4] != MAGIC and first[8:] != b"{":
            kind = "no GGUF file" if str(path).lower().endswith(".gguf") else "neither a GGUF nor a safetensors file"
            raise ValueError(f"it is {kind}: it begins with {first[:4]!r}")
        return first[:4] == MAGIC


class GGUFFile:
    """A file whose header was read. entries: by name; tensors: name -> GGUFTensor.

    Raises DamagedFile where the file is no GGUF file, or cut short in its header.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        with outside(path, "give a whole GGUF file"):
            self._bytes = np.memmap(path, np.uint8, "r")
            reader = _Reader(self._bytes)
            self.entries, self.tensors = reader.header()

    def blocks(self, name: str, inputs: int, size: int) -> Tensor:
        """The bytes of a tensor in blocks of so many inputs and bytes: uint8 [rows..., blocks, size], read now.

        Raises DamagedFile where the file ends before them, or rows are no whole blocks.
        """
        tensor = self.tensors[name]
        with outside(self.path, "copy or download it again"):
            *rows, columns = tensor.shape or (1,)
            if columns % inputs:
                raise ValueError(f"'{name}' has rows of {columns} numbers, which are no blocks of {inputs}")
            end = tensor.start + math.prod(rows) * (columns // inputs) * size
            if end > len(self._bytes):
                raise ValueError(f"'{name}' ends at byte {end} and the file at {len(self._bytes)}")
            found = torch.from_numpy(np.array(self._bytes[tensor.start : end]))
            return found.view(*rows, columns // inputs, size)


class _Reader:
    """Reads on through the bytes of a file. Raises ValueError or struct.error where they end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("it ends in the middle of its header")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int, inner: bool = False) -> Any:
        """A value; of arrays a list, or an array of numpy."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY and not inner:
            of, count = self.number("I"), self.number("Q")
            if of in SCALARS:
                return np.frombuffer(self.take(count * struct.calcsize(f"<{SCALARS[of]}")), f"<{SCALARS[of]}")
            return [
                self.value(of, inner=True) for _ in range(count)
            ]  # each takes bytes: the file bounds their number
        if kind not in SCALARS:
            raise ValueError(f"an entry has a value of type {kind}, which there is not")
        return self.number(SCALARS[kind])

    def header(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}, and versions 2 and 3 are known")
        count, number = self.number("Q"), self.number("Q")
        entries: dict[str, Any] = {}
        for _ in range(number):
            name = self.text()
            if name in entries:
                raise ValueError(f"entry '{name[:60]}' is in it twice")
            entries[name] = self.value(self.number("I"))
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(count):
            name, dimensions = self.text(), self.number("I")
            if name in tensors or dimensions > MOST_DIMENSIONS:
                raise ValueError(f"tensor '{name[:60]}' is in it twice, or has {dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
            tensors[name] = GGUFTensor(shape, self.number("I"), self.number("Q"))
        alignment = entries.get(ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its {ALIGNMENT} is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return entries, {name: GGUFTensor(one.shape, one.kind, one.start + start) for name, one in tensors.items()}
