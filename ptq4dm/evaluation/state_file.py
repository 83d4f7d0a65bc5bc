"""Weights that a measuring network is given by the name of a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from ..errors import UserError
from ..files.outside import finite, outside, unpickled_tensors


def read_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name (.pth, read with weights_only, or .safetensors), and its SHA-256.

    Raises DamagedFile; UserError where it holds something else, or NaN.
    """
    path = Path(path)
    with outside(path, "give a file of tensors, .pth or .safetensors"):
        data = path.read_bytes()
        state = load(data) if path.suffix == ".safetensors" else unpickled_tensors(data)
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise UserError(f"{path} does not hold a state dict (a flat map of names to tensors).")
        return {name: finite(tensor, str(name)) for name, tensor in state.items()}, hashlib.sha256(data).hexdigest()
