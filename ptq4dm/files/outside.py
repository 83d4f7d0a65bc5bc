"""Data from outside: the one place where files that we did not just write are read.

Whatever is wrong with a file, `DamagedFile` says it in one sentence: cut short, another format, nested without end,
numbers of a million digits, pictures that unpack to gigabytes. Nothing that is read here can run code.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle  # for the name of an error of torch's reader: nothing is unpickled by it
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import DamagedFile, UserError, printable
from ..interrupts import unswallowed

SAVED = (b"PK\x03\x04", b"\x80\x02")  # how files of torch.save begin: zip archives, and older ones
TEXT_LIMIT = 256 << 20  # bytes of a JSON file; the plans of the largest models take a few megabytes


@contextmanager
def outside(path: str | os.PathLike, advice: str = "") -> Iterator[None]:
    """Decode a file of others in this block: whatever fails there is a DamagedFile that names the file.

    advice: what to do about it, after a semicolon. UserErrors go through as they are.
    """
    end = f"; {advice}." if advice else "."
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError(errno.EINVAL, "it is no plain file")  # a pipe would keep us waiting, a device has no end
        with unswallowed():
            yield
    except UserError:
        raise
    except FileNotFoundError:
        raise DamagedFile(f"{path} is missing{end}") from None
    except Exception as error:  # decoders fail in every way there is; here alone, any of them means the same
        raise DamagedFile(f"{path} cannot be read ({reason(error)}){end}") from error


@contextmanager
def naming(what: str | os.PathLike) -> Iterator[None]:
    """Say of which file, or part of one, a UserError of this block tells; then it is a DamagedFile.

    One that names it already goes through as it is.
    """
    try:
        yield
    except UserError as error:
        if printable(str(what)) in str(error):
            raise
        raise DamagedFile(f"{what}: {error}") from None


def reason(error: BaseException) -> str:
    """An error's first line, short, without its full stop; its kind where it says nothing."""
    text = getattr(error, "strerror", None) or str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):
        lines[0] = f"no {lines[0]} in it"
    if isinstance(error, RecursionError):
        lines[0] = "it is nested too deeply"
    return textwrap.shorten(lines[0].rstrip("."), 200, placeholder=" ...")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, in which no name stands twice. Raises ValueError or RecursionError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"'{twice[:60]}' stands in it twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def read_json(path: str | os.PathLike, advice: str = "") -> Any:
    """The value that a JSON file of UTF-8 holds. Raises DamagedFile."""
    with outside(path, advice):
        if (size := os.stat(path).st_size) > TEXT_LIMIT:
            raise ValueError(f"its {size} bytes are more than any text of ours has")
        return parse_json(Path(path).read_text(encoding="utf-8"))


def read_object(path: str | os.PathLike, keys: Mapping[str, type | tuple[type, ...]], advice: str = "") -> dict:
    """The object that a JSON file holds, with at least these keys, their values of these types.

    Raises DamagedFile.
    """
    value = read_json(path, advice)
    with outside(path, advice):
        return checked_object(value, keys)


def checked_object(value: Any, keys: Mapping[str, type | tuple[type, ...]]) -> dict:
    """The value, if it is a dict with at least these keys, their values of these types; else ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds no object but {described(value)}")
    for name, kind in keys.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if name not in value:
            raise ValueError(f"no '{name}' in it")
        if not isinstance(value[name], kinds) or (isinstance(value[name], bool) and bool not in kinds):
            raise ValueError(f"its '{name}' is {described(value[name])}")
    return value


def described(value: Any) -> str:
    """A few words on a value that came in place of another."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return textwrap.shorten(text, 60, placeholder=" ...")


class TensorFile:
    """An open safetensors file. names: of its tensors; header: its texts by name."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.names: list[str] = list(file.keys())
        self.header: dict[str, str] = dict(file.metadata() or {})

    def tensor(self, name: str) -> Tensor:
        """One tensor, read now. Raises KeyError where there is none."""
        self._has(name)
        return self._file.get_tensor(name)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: self._file.get_tensor(name) for name in self.names}

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without its values."""
        self._has(name)
        return tuple(self._file.get_slice(name).get_shape())

    def like(self, name: str) -> Tensor:
        """A tensor on the meta device with the shape and dtype of one in the file: no value is read."""
        shape = self.shape(name)
        dtype = self._file.get_slice(name)[0:0].dtype if shape else self._file.get_tensor(name).dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a tensor, by number."""
        self._has(name)
        slices = self._file.get_slice(name)
        if len(rows) and int(rows.max()) >= slices.get_shape()[0]:
            raise IndexError(f"'{name}' has only {slices.get_shape()[0]} rows")
        return torch.cat([slices[row : row + 1] for row in rows.tolist()])

    def json(self, name: str) -> Any:
        """The value of a JSON text in the header."""
        if name not in self.header:
            raise ValueError(f"no '{name}' in its header")
        return parse_json(self.header[name])

    def _has(self, name: str) -> None:
        if name not in self.names:
            raise KeyError(name)


def read_tensors(path: str | os.PathLike, use: Callable[[TensorFile], Any], advice: str = "") -> Any:
    """use(the open safetensors file). Raises DamagedFile, naming the file, where it or `use` fails."""
    with outside(path, advice), safe_open(path, "pt") as file:
        return use(TensorFile(file))


def unpickled_tensors(data: bytes) -> Any:
    """What a file of torch.save holds, if it is tensors and plain containers: no other class is ever built.

    Raises ValueError for other files; torch's own texts advise to read them without that care.
    """
    if not data.startswith(SAVED):
        raise ValueError("it is no file of torch.save")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it is damaged, or holds more than tensors and plain containers") from None
    except Exception:  # torch fails in every way on what is cut short
        raise ValueError("it is damaged: no whole file of torch.save") from None


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor. Raises ValueError where it holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise ValueError(f"'{name}' holds NaN or infinity")
    return tensor
