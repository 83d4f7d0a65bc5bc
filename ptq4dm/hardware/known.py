"""Models known by their shapes alone: built from their configurations on the meta device, nothing is downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..files.outside import read_object
from .traced import works_of_call
from .work import Work

FILE = Path(__file__).with_name("known.json")
KNOWN = ("sdxl", "flux")


def facts_of(name: str) -> dict[str, Any]:
    """What known.json says of a model: class, config, inputs, parameters, steps and rows of an image, and why.

    Raises UserError for a name that it does not have.
    """
    if name not in KNOWN:
        raise UserError(f"'{name}' is not known by its shapes; those known are {', '.join(KNOWN)}.")
    return read_object(FILE, dict.fromkeys(KNOWN, dict))[name]


def meta_model(name: str) -> nn.Module:
    """The network, with shapes and no values."""
    import diffusers

    facts = facts_of(name)
    with torch.device("meta"):
        return getattr(diffusers, facts["class"]).from_config(facts["config"]).eval()


@cache
def works_of_known(name: str) -> tuple[Work, ...]:
    """The work of one step for one image, with the rows that guidance needs."""
    facts, model = facts_of(name), meta_model(name)
    with torch.device("meta"):
        inputs = _tensors(facts["inputs"], facts["rows"])
        return tuple(works_of_call(model, lambda: model(**inputs)))


def _tensors(shapes: dict[str, Any], rows: int) -> dict[str, Any]:
    return {
        name: _tensors(shape, rows)
        if isinstance(shape, dict)
        else torch.empty([rows if size == "rows" else size for size in shape])
        for name, shape in shapes.items()
    }
