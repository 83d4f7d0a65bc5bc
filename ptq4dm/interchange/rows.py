"""Weights as files of other tools have them, in plain order: rows that can be split, joined and put into our layers.

Every format here stores an output's codes and scales apart from those of other outputs, so that what converters of
names do with a float weight, which is to split and to join its rows, can be done with a quantized one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files.outside import outside
from ..layers.choices import check_choices, check_fit
from ..layers.registry import empty_quantized
from ..layers.stored import check_stored


@dataclass
class Rows:
    """A quantized weight [N, K].

    plan: the choices of the layer that it makes. tensors: those of the layer with a row for each output, by name.
    shared: its others, which are the same for all outputs.
    """

    plan: Any
    inputs: int
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        return len(next(iter(self.tensors.values())))

    def pick(self, rows: Tensor) -> Rows:
        """Some rows, by number, in this order."""
        first, count = int(rows[0]), len(rows)
        chosen: Any = rows
        if bool((rows == torch.arange(first, first + count)).all()):
            chosen = slice(first, first + count)
        return Rows(self.plan, self.inputs, {name: one[chosen] for name, one in self.tensors.items()}, self.shared)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several weights one after the other. Raises ValueError where they are not of one format."""
        first = parts[0]
        if len(parts) == 1:
            return first
        if any((one.plan, one.inputs) != (first.plan, first.inputs) for one in parts):
            raise ValueError("its rows come from weights of several formats")
        kinds = {name: {one.tensors[name].dtype for one in parts} for name in first.tensors}
        if mixed := [name for name, dtypes in kinds.items() if len(dtypes) > 1]:
            raise ValueError(f"its rows have '{mixed[0]}' of several types")
        tensors = {name: torch.cat([one.tensors[name] for one in parts]) for name in first.tensors}
        return cls(first.plan, first.inputs, tensors, first.shared)


PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Of a denoiser's tensors in files that have one, with other networks beside it or without."""


@dataclass
class Found:
    """What a file holds: quantized weights and other tensors by their names in it. where: how messages call it."""

    where: str
    weights: dict[str, Rows]
    tensors: dict[str, Tensor]


def layer_of(linear: nn.Linear, rows: Rows, bias: Tensor | None, name: str, where: str) -> nn.Module:
    """The quantized layer that takes the place of a Linear, on its device and with a bias of its dtype.

    Raises UserError where the file's tensors are not what the layer takes.
    """
    n, k = rows.outputs, rows.inputs
    if (n, k) != (linear.out_features, linear.in_features):
        raise UserError(
            f"'{name}' of {where} has {k} inputs and {n} outputs; the model needs {linear.in_features} and "
            f"{linear.out_features}."
        )
    check_choices(name, rows.plan, where)
    check_fit(name, rows.plan, linear, where)
    layer = empty_quantized(linear, rows.plan, "meta")
    values = {**rows.tensors, **rows.shared, **({} if bias is None else {"bias": bias})}
    with outside(where), _by_names_of_files(name):
        check_stored(layer, values, prefix=f"{name}.")
    if bias is not None:
        values["bias"] = bias.to(layer.bias.dtype)
    device = "cpu" if linear.weight.is_meta else linear.weight.device
    # Copies: rows of one tensor of a file would be memory that safetensors refuses to save.
    layer.put(**{
        key: one.to(device, copy=True, memory_format=torch.contiguous_format) for key, one in values.items()
    })  # fmt: skip
    if layer.like is not None:
        layer.put(like=torch.zeros(1, dtype=layer.model_dtype, device=device))
    return layer.train(linear.training)


PARTS = {"qweight": "codes", "wscales": "scales", "woffsets": "offsets", "outer": "scale of the scales",
         "outer_scales": "scales of the scales", "outer_offsets": "scales of the offsets"}  # fmt: skip


@contextmanager
def _by_names_of_files(layer: str) -> Iterator[None]:
    """Say "'layer.weight' (its scales)" of what no file has under the name that it has in our layers."""
    try:
        yield
    except ValueError as error:
        name = re.compile(rf"'{re.escape(layer)}\.({'|'.join(PARTS)})'")
        text = name.sub(lambda found: f"'{layer}.weight' (its {PARTS[found[1]]})", str(error))
        raise ValueError(text) from None


def floats_of(rows: Rows, name: str, where: str) -> Tensor:
    """The weight [N, K] float32 that the codes stand for. Raises UserError as `layer_of` does."""
    like = nn.Linear(rows.inputs, rows.outputs, bias=False, device="meta", dtype=torch.float32)
    return layer_of(like, rows, None, name, where).dequantized_weight()
