"""Arrays of others in npz files: read by name, after a look at their sizes. Nothing is unpickled."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from .outside import outside

MOST = 1 << 29  # bytes of one array: a covariance of 8192 features in float64


class ArrayFile:
    """An open npz file. names: of its arrays."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._entries = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
        self.names = list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """An array's shape, from its header."""
        with self._file.open(self._entries[name]) as file:
            return _header(file)[0]

    def array(self, name: str) -> np.ndarray:
        """One array. Raises ValueError where it is larger than MOST, of objects, or not of the length it says."""
        info = self._entries[name]
        with self._file.open(info) as file:
            shape, dtype = _header(file)
            size = math.prod(shape) * dtype.itemsize
            if not size <= min(info.file_size - file.tell(), MOST):
                raise ValueError(f"'{name}' is {list(shape)} {dtype}, which cannot be")
        with self._file.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def read_arrays(path: str | os.PathLike, use: Callable[[ArrayFile], Any], advice: str = "") -> Any:
    """use(the open npz file). Raises DamagedFile, naming the file, where it or `use` fails."""
    with outside(path, advice), zipfile.ZipFile(path) as file:
        return use(ArrayFile(file))


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    return shape, dtype
