"""W4A8 layers in integers, each with all its launches, to be searched for settings and timed.

What is timed is the whole call: one setting decides whether weights are widened in the product or unpacked before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..runtime.settings import capability, served
from ..w4 import integer
from .candidates_integer import settings_of
from .launch import DEVICE, WholeLayer
from .launches_w4 import cold_sets

SIZES = (128, 64, 32)  # inputs of a group: the first that makes several


@dataclass(frozen=True)
class IntegerLaunch(WholeLayer):
    """A layer of N outputs and K inputs on M rows; mode: "progressive" or "grouped"."""

    m: int
    n: int
    k: int
    mode: str

    def settings(self) -> list[dict]:
        major = capability(torch.device(DEVICE))[0]
        return settings_of(self.mode, self.m, major >= 9, major == 9)

    def compiled_as(self, setting: dict) -> tuple:
        """Sizes are not compiled in, but whether 16 divides them is, and how wide a group is."""
        size = _group(self.k)
        counts = self.m, self.n, self.k, self.k // size, math.ceil(self.k / 128)
        return (self.mode, size, *(count % 16 == 0 for count in counts), *sorted(setting.items()))

    def one(self) -> Callable:
        return _one(self)

    def cold(self) -> list[Callable]:
        return _cold(self)


def launches(m: int, n: int, k: int, mode: str) -> list[IntegerLaunch]:
    """What serves a layer on this GPU. Raises ValueError where these kernels do not run."""
    if not served(torch.device(DEVICE)):
        raise ValueError("no kernel for 4-bit weights in integers on this device.")
    return [IntegerLaunch(m, n, k, mode)]


def call_of(launch: IntegerLaunch, seed: int, biased: bool = True) -> Callable:
    """The layer on random operands with zero points, in the widest groups; it takes `config`.

    Scales are powers of two: without a bias, outputs are rounded once, wherever a kernel applies them.
    """
    m, n, k = launch.key
    generator = torch.Generator(DEVICE).manual_seed(seed)
    size = _group(k)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, device=DEVICE, dtype=torch.int8)

    x = torch.randn(m, k, generator=generator, device=DEVICE).bfloat16()
    bias = torch.randn(n, generator=generator, device=DEVICE).bfloat16() if biased else None
    qweight = whole(-8, 7, n, k // 2).view(torch.uint8)
    zeros, scales = whole(-2, 2, n, k // size), torch.full((n, k // size), 2.0**-7, device=DEVICE)
    if launch.mode == "grouped":
        return functools.partial(integer.grouped_through, x, qweight, scales.half(), zeros, bias)
    steps = whole(4, 12, n, k // size)
    return functools.partial(integer.progressive_through, x, qweight, steps, zeros, scales[:, 0] / 8, bias)


def _group(k: int) -> int:
    return next(size for size in SIZES if k % size == 0 and k > size)


@functools.lru_cache(maxsize=1)
def _one(launch: IntegerLaunch) -> Callable:
    return call_of(launch, 0)


@functools.lru_cache(maxsize=1)
def _cold(launch: IntegerLaunch) -> list[Callable]:
    """As many sets of operands as no cache holds: each call finds its own in memory."""
    m, n, k = launch.key
    return [call_of(launch, seed) for seed in range(cold_sets(m, n, k))]
