"""What a plan says of an input in parts: where they begin, and how the grid of each differs from the layer's one.

    part p:  x ~ s / f_p (q - z - o_p)      s, z: the layer's own grid;  f_p: its factor, o_p: its offset

The layer multiplies codes of x f_p + s o_p by a weight W / f: products of all parts are integers under one scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MOST = 2.0**20  # of a factor and its inverse: parts that differ by more are no two parts of one input


@dataclass
class SplitChoices:
    """What plans of a split input share, beside the plan of the format that they are of.

    seams: the input channels at which parts after the first begin, rising.
    input_factors: of each part, the layer's input scale over the part's own.
    input_offsets: of each part, its own zero point less the layer's; 0 in convolutions that pad, as a border of zeros
        has one code.
    """

    seams: list[int] = field(default_factory=list)
    input_factors: list[float] = field(default_factory=list)
    input_offsets: list[int] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError where a choice is out of its range, or does not go with another."""
        super().check()  # type: ignore[misc]  # the format's, which comes after this class
        if (
            not self.seams
            or self.seams[0] < 1
            or any(a >= b for a, b in zip(self.seams, self.seams[1:], strict=False))
        ):
            raise ValueError("seams holds channels from 1 on, rising")
        if not len(self.input_factors) == len(self.input_offsets) == len(self.seams) + 1:
            raise ValueError("input_factors and input_offsets have one number for each part, one more than seams")
        for factor in self.input_factors:
            if not (math.isfinite(factor) and 1 / MOST <= factor <= MOST):
                raise ValueError(f"input_factors holds {factor}, out of [2^-20, 2^20]")
        if any(abs(offset) >= 2**self.activation_bits for offset in self.input_offsets):  # type: ignore[attr-defined]
            raise ValueError("input_offsets holds a number that no zero point is away from another")
        if not self.static:  # type: ignore[attr-defined]
            raise ValueError("parts of an input have static grids, and input_scale is none")

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ValueError where the parts are not those of a float layer."""
        super().check_layer(layer)  # type: ignore[misc]
        if getattr(layer, "groups", 1) != 1:
            raise ValueError("grouped convolutions have no parts: their groups read different channels")
        if self.seams[-1] >= layer.weight.shape[1]:
            raise ValueError(f"seams names channel {self.seams[-1]}, and there are {layer.weight.shape[1]}")
        if any(self.input_offsets) and pads(layer):
            raise ValueError("input_offsets are all 0 in a convolution that pads")

    @property
    def input_parts(self) -> int:
        """How many parts the input has, each with its grid."""
        return len(self.seams) + 1

    @property
    def groups_text(self) -> str:
        where = ", ".join(map(str, self.seams))
        return f"{super().groups_text} split at {where}"  # type: ignore[misc]

    def channels(self, channels: int) -> tuple[Tensor, Tensor]:
        """(factors, offsets) of each of so many input channels, float32."""
        sizes = torch.tensor([b - a for a, b in parts_of(self.seams, channels)])
        factors, offsets = (
            torch.tensor(one, dtype=torch.float32) for one in (self.input_factors, self.input_offsets)
        )
        return factors.repeat_interleave(sizes), offsets.repeat_interleave(sizes)


def parts_of(seams: list[int] | tuple[int, ...], channels: int) -> list[tuple[int, int]]:
    """(first channel, one past the last) of each part of so many channels."""
    ends = [0, *seams, channels]
    return list(zip(ends, ends[1:], strict=False))


def pads(layer: Any) -> bool:
    """Whether a layer is a convolution that surrounds its input with zeros."""
    padding = getattr(layer, "padding", (0, 0))
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(padding)
