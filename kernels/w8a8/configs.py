"""Tiles that the W8A8 kernel uses: measured where a device was tuned, else one that is sane for its capability.

A GPU's file in tuned/ has "w8a8": {shape class: Config}; `ptq4dm bench tune` makes it. A shape class is the
operand type, the window, the channels and the number of rows to the nearest power of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..runtime.integers import cdiv, next_power_of_2
from ..runtime.settings import capability, own
from .window import Window

LITTLE_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0))  # 100 KB


@dataclass(frozen=True)
class Config:
    """bm, bn, bk: tile of output rows, output channels and K; warps, stages: Triton's num_warps and num_stages.

    mode: how operands are loaded, see product.py; "tma" needs stride 1 and Hopper or later, "gluon" Hopper and rows.
    programs: per multiprocessor, each of which works off many tiles; 0 for one program a tile.
    registers: per thread, at most; 0 leaves it to the compiler.
    band: of "gluon", blocks of rows that tiles go down before one to the right.
    """

    mode: str
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    programs: int = 0
    registers: int = 0
    band: int = 0


GLUON = Config("gluon", 128, 128, 128, 4, 6, band=4)


def shape_class(dtype: torch.dtype, window: Window, channels: int, n: int, on_load: bool = False) -> str:
    """channels: as stored, a multiple of 32."""
    name = "int8" if dtype == torch.int8 else "fp8"
    rows = window.batch * math.prod(window.output)
    kind = "on-load" if on_load else f"{window.kernel[0]}x{window.kernel[1]}/{max(window.stride)}"
    return f"{name} {kind} C{channels} N{n} M2^{round(math.log2(rows))}"


def choose(
    dtype: torch.dtype, window: Window, channels: int, n: int, device: torch.device, on_load: bool, alone: bool = True
) -> Config:  # fmt: skip
    """Config measured for the shape, or else for the same layer with twice or half the rows; or the default.

    alone: nothing is added to a product but a bias, and scales are one or one a row, as "gluon" needs it.
    """
    measured = own(device).get("w8a8", {})
    layer, power = shape_class(dtype, window, channels, n, on_load).split("^")
    for more in (0, 1, -1):
        entry = measured.get(f"{layer}^{int(power) + more}")
        if entry and (alone or entry["mode"] != "gluon"):
            return Config(**entry)
    return default(dtype, window, channels, n, capability(device), on_load, alone)


def default(
    dtype: torch.dtype, window: Window, channels: int, n: int, capability: tuple[int, int], on_load: bool,
    alone: bool = True,
) -> Config:  # fmt: skip
    """Tiles of 128 x 128 or, where rows or outputs are few, what covers them: as an H200 likes most of its shapes."""
    rows = window.batch * math.prod(window.output)
    if alone and capability[0] == 9 and window.rows_of_pixels and not on_load and _fills_hopper(rows, channels, n):
        return GLUON
    bm = 128 if rows >= 2**15 else 64 if rows > 32 else 32
    bn = min(128, max(16, next_power_of_2(n)))
    bk = next(size for size in (128, 64, 32) if channels % size == 0)
    if on_load or capability in LITTLE_SHARED_MEMORY:
        bk = min(bk, 64)
    stages = 3 if bm == 128 else 4
    if on_load:
        return Config("on-load", bm, bn, bk, 4, stages)
    large = rows >= 2**17 and channels % 64 == 0 and n >= 64
    if large and dtype != torch.int8 and capability >= (9, 0) and max(window.stride) == 1:
        return Config("tma", bm, bn, bk, 4, stages, programs=2)
    return Config("gather", bm, bn, bk, 4, stages)


def _fills_hopper(rows: int, channels: int, n: int) -> bool:
    """Whether tiles of 128 x 128 are many enough for Gluon's kernel to be the faster one, as measured on an H200."""
    return rows > 64 and channels >= 256 and cdiv(rows, GLUON.bm) * cdiv(n, GLUON.bn) >= 66
