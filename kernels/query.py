"""What is asked of a kernel: a quantized layer in a few words."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

WEIGHTS, ACTIVATIONS = (
    ("int8", "fp8", "int4", "row-mix", "codebook", "power", "kv4", "attention8", "bcq", "blocks"),
    ("int8", "fp8", "int4", "none"),
)


@dataclass(frozen=True)
class Query:
    """A quantized layer in a few words.

    weight: "int8", "fp8" or "int4"; "row-mix", rows of int8 among plain rows of int4, with zero points in these or
        not; "codebook", 4-bit codes of 16 int8 levels (formats/codebook.py); "power", levels that are floats; "bcq",
        sums of `planes` sign planes; "blocks", codes under the scales and offsets of other tools' files
        (formats/blocks.py); or what stands in a weight's place in attention: "kv4", keys and values in 4 bits under
        queries of 16, "attention8", keys and values in 8 bits under queries in "int8" or "fp8", heads of `inputs`
        channels, None for 128.
    activation: "int8", "fp8", "int4", or "none" for 16-bit inputs.
    group_size: inputs under one scale of the weight; None for one scale a row.
    groups: of a convolution. rows: of the inputs in one call (tokens or pixels); None for many.
    linear: a Linear layer, or a convolution of one pixel; inputs: K of it, None for a multiple of 64.
    static: one activation scale for all rows, known before. zeros: the 4-bit weight has zero points, or the
        binary-coded one offsets.
    progressive: the scales of a 4-bit weight's groups are whole steps of one scale a row (w4/progressive.py).
    branch: a 4-bit layer with a low-rank branch in 16 bits and smoothing (w4/layer.py), of any rank, 0 too; without
        it a 4-bit weight is plain (w4/int4_codes.py).

    Raises ValueError for other words.
    """

    weight: str
    activation: str
    group_size: int | None = None
    groups: int = 1
    rows: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    static: bool = False
    zeros: bool = False
    progressive: bool = False
    branch: bool = False
    linear: bool = True
    inputs: int | None = None
    planes: int = 3

    def __post_init__(self):
        for name, given, known in (
            ("weight", self.weight, WEIGHTS),
            ("activation", self.activation, ACTIVATIONS),
        ):
            if given not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not '{given}'.")
        if self.weight == "bcq" and not (self.progressive or self.branch):
            return
        parts = self.group_size is not None and self.weight not in ("row-mix", "codebook")
        if self.weight != "int4" and (parts or self.zeros or self.progressive or self.branch):
            raise ValueError(f"only int4 weights have groups of scales, zero points or a branch, not {self.weight}.")
        if self.progressive and self.branch:
            raise ValueError("progressive weights have no branch.")
