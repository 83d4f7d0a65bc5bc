"""The settings of the kernels that `bench_kernels.py --tune` tries."""

from __future__ import annotations

import itertools

import torch

from ptq4dm.kernels.svdq_linear import FP8, INT4
from ptq4dm.kernels.tuning import capability


def activation_settings(m: int, k: int) -> list[dict]:
    """BM, BK, STAGES of the programs that multiply by D; ROWS, STEP of those that quantize; warps of both."""
    shapes = [(16, 128, 3), (16, 256, 2), (32, 64, 3), (32, 64, 4), (32, 128, 3), (64, 64, 3)]
    if m <= 64:
        shapes = [(16, 256, 4), (16, 512, 3)]
    rows = [(1, 512, 4), (1, 1024, 8), (2, 1024, 4), (2, 1024, 8), (1, 512, 2)]
    return [
        dict(BM=bm, BK=bk, STAGES=stages, ROWS=rows, STEP=step, num_warps=warps)
        for (bm, bk, stages), (rows, step, warps) in itertools.product(shapes, rows)
        if rows * k <= 4096 * warps
    ]


def prepare_settings(m: int, k: int) -> list[dict]:
    """The same, and bytes of codes that an unpacking program reads."""
    return [one | dict(UNPACK_BYTES=8192) for one in activation_settings(m, k)]


def product_settings(name: str, hopper: bool) -> list[dict]:
    """Tiles, stages, warps, programs for each multiprocessor, order of the tiles; Gluon's too for fp8 on Hopper."""
    one = dict(TMA=True, PIECES=2, PER_SM=1, BAND=8, num_warps=8)
    two = dict(TMA=True, PIECES=2, PER_SM=2, BAND=16, num_warps=4)
    return (gluon_settings() if hopper and name == FP8 else []) + [
        one | dict(BM=128, BN=256, BK=128, num_stages=3),
        one | dict(BM=128, BN=256, BK=64, num_stages=5),
        one | dict(BM=256, BN=128, BK=128, num_stages=3),
        one | dict(BM=128, BN=128, BK=128, num_stages=4),
        two | dict(BM=128, BN=128, BK=64, num_stages=4),
        two | dict(BM=128, BN=128, BK=128, num_stages=2),
    ]


def gluon_settings() -> list[dict]:
    """In ping-pong and side by side: as many stages as the shared memory of Hopper holds, few bytes from L2 first."""
    shapes = [(False, 128, 256, 4), (False, 256, 128, 4), (True, 128, 128, 6)]
    small = [(False, 128, 128, 6), (True, 64, 256, 4), (True, 64, 128, 8)]
    return [
        dict(GLUON=True, PINGPONG=pingpong, BM=bm, BN=bn, BK=128, BAND=band, STAGES=stages)
        for band, tiles in ((8, shapes + small), (16, shapes))
        for pingpong, bm, bn, stages in tiles
    ]


def w4a4_settings() -> list[dict]:
    """The product of groups: small tiles, several on a multiprocessor, so that sums and scaling overlap."""
    shapes = [(64, 128, 4, 2), (64, 128, 8, 2), (128, 128, 8, 1), (128, 64, 4, 2), (64, 256, 8, 1), (64, 64, 4, 4)]
    return [
        dict(TMA=True, BM=bm, BN=bn, BAND=16, PER_SM=programs, num_warps=warps, num_stages=stages)
        for (bm, bn, warps, programs), stages in itertools.product(shapes, (3, 4, 5))
    ]


def short_settings(m: int) -> list[dict]:
    """Outputs and bytes of each that a step takes; among how many programs the inputs are divided."""
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    shapes = [(64, 128, 4, 4), (64, 128, 6, 4), (32, 128, 4, 4), (64, 64, 6, 4), (64, 256, 3, 4), (128, 128, 4, 8)]
    return [
        dict(SPLIT=split, BM=bm, BN=bn, BYTES=size, STAGES=stages, num_warps=warps)
        for (bn, size, stages, warps), split in itertools.product(shapes, (1, 2, 4))
    ]


def settings_of(step: str, name: str, m: int, k: int) -> list[dict]:
    """All settings to try of one launch of the kernels called `name`, for m rows of k inputs."""
    if step == "product":
        return w4a4_settings() if name == INT4 else product_settings(name, capability(torch.device("cuda"))[0] == 9)
    if step == "unpack":
        return [dict(UNPACK_BYTES=size, num_warps=warps) for size in (2048, 4096, 8192, 16384) for warps in (4, 8)]
    if step == "short":
        return short_settings(m)
    return prepare_settings(m, k) if step == "prepare" else activation_settings(m, k)
