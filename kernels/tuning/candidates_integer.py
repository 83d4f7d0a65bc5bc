"""The settings of W4A8 products in integers that a search tries (search.py)."""

from __future__ import annotations

from ..runtime.integers import next_power_of_2
from .candidates_w4 import hopper_settings, product_settings

# BM, BN, num_warps, num_stages, and where they are limited registers of a thread: tiles of many rows, then of few. Of
# 128 x 128 two fit a multiprocessor: in 4 warps, or in 8 of 128 registers.
PROGRESSIVE = (
    (128, 128, 8, 3, 128), (128, 128, 4, 3), (128, 128, 4, 4), (256, 128, 8, 3), (256, 128, 8, 4), (128, 256, 8, 4),
    (256, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 4), (64, 128, 4, 4),
    (64, 64, 4, 4), (64, 64, 4, 6), (32, 128, 4, 5), (32, 64, 4, 6), (16, 128, 4, 5), (16, 64, 4, 6), (16, 64, 4, 8),
)  # fmt: skip
# An output has two sums, so that tiles are half as large. Of 128 x 64 in 4 warps of 168 registers three fit.
GROUPED = (
    (128, 64, 4, 3, 168), (128, 64, 4, 4), (64, 128, 4, 3), (128, 128, 8, 3), (256, 64, 8, 3), (64, 64, 4, 3, 128),
    (64, 64, 4, 5), (32, 128, 4, 5), (32, 64, 4, 6), (16, 128, 4, 5), (16, 64, 4, 6), (16, 64, 4, 8),
)  # fmt: skip
WIDE = (8, 16)  # blocks of rows that tiles go down before they go to the right


def settings_of(mode: str, m: int, tma: bool, hopper: bool = False) -> list[dict]:
    """All settings to try for m rows of "progressive" or "grouped" weights; tma: the GPU has the copy engine."""
    rows = max(16, next_power_of_2(m))
    found = []
    for bm, bn, warps, stages, *registers in PROGRESSIVE if mode == "progressive" else GROUPED:
        if bm > rows or (rows >= 256 and bm < 64):
            continue
        tile = dict(TMA=tma, BM=bm, BN=bn) | (dict(BK=128) if mode == "progressive" else {})
        bands = WIDE if m > 4 * bm else WIDE[:1]
        ending = dict(num_warps=warps, num_stages=stages) | (dict(maxnreg=registers[0]) if registers else {})
        found += [tile | dict(BAND=band) | ending for band in bands]
    if mode == "progressive" and rows >= 256:
        products = product_settings() + hopper_settings() * hopper if tma else [POINTERS]
        found += [dict(UNPACK=True) | one for one in products]
    return found


POINTERS = dict(TMA=False, BM=128, BN=128, BK=64, BAND=8, num_warps=8, num_stages=3)
