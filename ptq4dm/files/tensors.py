"""Safetensors files, whole at any time, with equal bytes for equal contents."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping

from safetensors.torch import save_file
from torch import Tensor

from .atomic import replacing
from .outside import parse_json


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> None:
    """Write tensors, wherever they lie, and texts of a header in the order of their names.

    Raises UserError where the file cannot be written.
    """
    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            None if header is None else dict(header),
        )
        if header and len(header) > 1:
            _sort_header(temporary)


def _sort_header(path: str | os.PathLike) -> None:
    """Safetensors keeps a header's texts in a hash map, and writes them in an order that changes from run to run."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        contents = parse_json(file.read(size).decode())
        contents["__metadata__"] = dict(sorted(contents["__metadata__"].items()))
        text = json.dumps(contents, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
