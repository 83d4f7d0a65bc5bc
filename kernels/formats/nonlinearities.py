"""Functions that a model has after a product or as a gate, by the names that ops know them by."""

from __future__ import annotations

import torch.nn.functional as F

NONLINEARITIES = {
    "": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def check(nonlinearity: str) -> None:
    """Raises ValueError for a name that is not known."""
    if nonlinearity not in NONLINEARITIES:
        known = ", ".join(f"'{name}'" for name in NONLINEARITIES)
        raise ValueError(f"the nonlinearity after a product is one of {known}, not '{nonlinearity}'.")
