"""Embeddings of prompts that were encoded elsewhere, from a file: given to pipelines without text encoders."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..files.outside import TensorFile, finite, read_tensors
from .denoiser import components_of

FIRST = "prompt_embeds"
ADVICE = f"give a safetensors file with {FIRST} [K, L, D], of the pipeline's encode_prompt"


def read_prompt_embeds(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors by the names of a pipeline's arguments, K rows each: prompt_embeds [K, L, D], and what else it takes,
    such as pooled_prompt_embeds [K, D], negative_prompt_embeds or prompt_attention_mask.

    Raises:
        UserError: there is no such file, no prompt_embeds in it, or not one row of each for a prompt.
        DamagedFile: it is no safetensors file, or holds NaN or infinity.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path} of prompts' embeddings.")
    return read_tensors(Path(path), _checked, ADVICE)


def _checked(file: TensorFile) -> dict[str, Tensor]:
    found = {name: finite(tensor, name) for name, tensor in file.tensors().items()}
    if not any(name.startswith(FIRST) for name in found):
        raise ValueError(f"it holds no {FIRST}")
    rows = {name: len(tensor) if tensor.ndim else 0 for name, tensor in found.items()}
    if len(set(rows.values())) > 1 or not min(rows.values()):
        counted = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise ValueError(f"each tensor in it needs one row for a prompt; {counted}")
    return found


def lacks_encoders(pipe) -> bool:
    """Whether a pipeline has places for text encoders, and none in them."""
    parts = components_of(pipe)
    encoders = [name for name in parts if name.startswith("text_encoder")]
    return bool(encoders) and all(parts[name] is None for name in encoders)
