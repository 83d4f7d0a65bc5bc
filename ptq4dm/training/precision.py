"""What a precision of training is called."""

from __future__ import annotations

import torch

PRECISIONS = {"float32": "no", "bfloat16": "bf16"}  # what the two are called where a dtype is taken


def precision_of(given: object) -> object:
    """Accelerate's name of a dtype, or of a dtype's name; anything else as it was given, for checks to refuse."""
    if not isinstance(given, (str, torch.dtype)):
        return given
    name = str(given).removeprefix("torch.")
    return PRECISIONS.get(name, name)
