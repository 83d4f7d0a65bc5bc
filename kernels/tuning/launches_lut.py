"""Binary-coded layers of few rows, to be searched for settings and timed: look-up tables, or sign planes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..formats.bcq import TILE, WORD
from ..lut import layer
from ..runtime.settings import served
from . import stopwatch
from .launch import DEVICE, WholeLayer

BITS = 3
RUN = {"look-up": layer.looked_up, "planes": layer.by_planes}
SIZES = (128, 64, 32)  # inputs of a group: the first that fits


@dataclass(frozen=True)
class LutLaunch(WholeLayer):
    """A layer of N outputs and K inputs on M rows, with 3 planes; mode: a key of RUN."""

    m: int
    n: int
    k: int
    mode: str

    def settings(self) -> list[dict]:
        return settings_of(self.mode, self.m)

    def compiled_as(self, setting: dict) -> tuple:
        """What is compiled in: words and groups of a row; of other sizes, whether 16 divides them."""
        return (self.mode, self.k, self.m % 16 == 0, self.m == 1, self.n % 16 == 0, *sorted(setting.items()))

    def one(self) -> Callable:
        return _one(self)

    def cold(self) -> list[Callable]:
        return _cold(self)


def settings_of(mode: str, m: int) -> list[dict]:
    """All settings to try for m rows."""
    if mode == "look-up":
        rows = [r for r in (1, 2, 4) if r <= max(m, 1)]
        return [dict(W=w, R=r, num_warps=warps) for w, r, warps in itertools.product((2, 4, 8, 16), rows, (2, 4, 8))]
    bm = 8 if m <= 8 else 16
    tried = [dict(BM=bm, BN=bn, num_warps=warps) for bn, warps in itertools.product((16, 32, 64), (2, 4, 8))]
    return [one | dict(maxnreg=registers) for one in tried for registers in (None, 64, 96)]


def launches(m: int, n: int, k: int, mode: str) -> list[LutLaunch]:
    """What serves a layer on this GPU. Raises ValueError where these kernels do not run."""
    if not served(torch.device(DEVICE)):
        raise ValueError("no kernel for binary-coded weights on this device.")
    return [LutLaunch(m, n, k, mode)]


def operands(
    m: int, n: int, k: int, bits: int, group_size: int | None, offsets: bool, device: torch.device, seed: int
) -> tuple:
    """(x, words, scales, offsets, bias, N) of a layer at random: bf16 on a GPU, float32 on a CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tiles, groups = math.ceil(n / TILE), 1 if group_size is None else k // group_size
    x, bias = (torch.randn(size, generator=generator, device=device).to(dtype) for size in ((m, k), (n,)))
    words = torch.randint(
        -(2**31), 2**31, (tiles, math.ceil(k / WORD), bits, TILE), generator=generator, device=device,
        dtype=torch.int32,
    )  # fmt: skip
    scales = (torch.rand(tiles, groups, bits, TILE, generator=generator, device=device) * k**-0.5).half()
    shift = torch.zeros(tiles, groups, TILE, device=device, dtype=torch.float16) if offsets else None
    return x, words, scales, shift, bias, n


def call_of(launch: LutLaunch, seed: int) -> Callable:
    """The layer on random operands in the widest groups; it takes `config`."""
    size = next((size for size in SIZES if launch.k % size == 0), None)
    return functools.partial(RUN[launch.mode], *operands(*launch.key, BITS, size, False, torch.device(DEVICE), seed))


@functools.lru_cache(maxsize=1)
def _one(launch: LutLaunch) -> Callable:
    return call_of(launch, 0)


@functools.lru_cache(maxsize=1)
def _cold(launch: LutLaunch) -> list[Callable]:
    """As many sets of operands as no cache holds: each call finds its own in memory."""
    moved = launch.n * launch.k * BITS // 8
    return [call_of(launch, seed) for seed in range(max(2, min(64, math.ceil(stopwatch.COLD / moved))))]
