"""Attention on 4-bit keys and values, to be searched for settings and timed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import product
from ..formats.kv4 import KV4, quantize_kv4
from ..runtime.integers import next_power_of_2
from . import stopwatch
from .launch import DEVICE, WholeLayer

# BM queries, BN tokens of a tile, num_warps; what a thread of 4 warps cannot hold is left out
TILES = ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))
STAGES = (2, 3)


@dataclass(frozen=True)
class AttentionLaunch(WholeLayer):
    """M queries of `heads` heads of each of `batch` pictures over L tokens, of heads d wide; no mask."""

    batch: int
    heads: int
    rows: int
    tokens: int
    width: int
    kernel = "kv4.attention"

    @property
    def key(self) -> list[int]:
        return [self.rows, self.tokens, self.width]

    @property
    def moved(self) -> int:
        """Bytes: queries and results of 16 bits, and codes."""
        each = 4 * self.rows * self.width + self.tokens * (self.width + 8)
        return self.batch * self.heads * each

    def settings(self) -> list[dict]:
        return settings_of(self.rows, self.tokens, self.width)

    def compiled_as(self, setting: dict) -> tuple:
        """Heads and their width are compiled in; of other sizes, whether 16 divides them."""
        return (self.heads, self.width, self.rows % 16 == 0, self.tokens % 16 == 0, *sorted(setting.items()))

    def one(self) -> Callable:
        return _one(self)

    def cold(self) -> list[Callable]:
        return _cold(self)


def settings_of(rows: int, tokens: int, width: int) -> list[dict]:
    """All settings to try; no tile is larger than what there is."""
    tiles = []
    for bm, bn, warps in TILES:
        if bn >= 2 * max(16, next_power_of_2(tokens)) or bm > max(64, next_power_of_2(rows)):
            continue
        if width > 64 and bm // warps > 16 and bn > 32:
            continue
        tiles.append(dict(BM=bm, BN=bn, num_warps=warps))
    rest = [dict(num_stages=stages) for stages in STAGES]
    return [tile | one for tile, one in itertools.product(tiles, rest)]


def operands(launch: AttentionLaunch, seed: int, device: str = DEVICE) -> tuple[Tensor, Tensor, Tensor]:
    """(q [B, H, M, d], a view of [B, M, H, d] as in a model, keys and values [B, H, L, d]): bf16, at random."""
    generator = torch.Generator(device).manual_seed(seed)

    def made(rows: int) -> Tensor:
        size = launch.batch, rows, launch.heads, launch.width
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)

    return made(launch.rows), made(launch.tokens).contiguous(), made(launch.tokens).contiguous()


def call_of(launch: AttentionLaunch, seed: int) -> Callable[[dict | None], Tensor]:
    """Attention on random operands; it takes settings, None for the usual ones."""
    q, *kv = operands(launch, seed)
    key, value = (quantize_kv4(one) for one in kv)

    def call(config: dict | None = None) -> Tensor:
        return product.attention(q, KV4(*key), KV4(*value), None, launch.width**-0.5, config)

    return call


@functools.lru_cache(maxsize=1)
def _one(launch: AttentionLaunch) -> Callable:
    return call_of(launch, 0)


@functools.lru_cache(maxsize=1)
def _cold(launch: AttentionLaunch) -> list[Callable]:
    """As many sets of operands as no cache holds: each call finds its own in memory."""
    return [call_of(launch, seed) for seed in range(sets_of(launch))]


def sets_of(launch: AttentionLaunch) -> int:
    """How many sets of operands no cache holds."""
    return max(1, min(16, math.ceil(stopwatch.COLD / launch.moved)))
