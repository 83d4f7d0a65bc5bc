"""The settings of SVDQuant's kernels that a search tries (search.py)."""

from __future__ import annotations

import itertools

import torch

from ..formats.int4 import GROUP
from ..w4.layer import FP8, INT4, INT8, SHORT, WEIGHT_ONLY


def activation_settings(m: int, k: int) -> list[dict]:
    """BM, BK, STAGES of the programs that multiply by D; ROWS, STEP of those that quantize; warps and
    registers at most of both."""
    shapes = [(64, 64, 4), (64, 64, 3), (32, 128, 3)]
    if m <= SHORT:
        shapes = [(16, 256, 4), (16, 512, 3)]
    rows = [(1, 512, 4, None), (1, 1024, 8, None), (2, 1024, 4, None), (4, 256, 4, None)]
    rows += [(1, 1024, 8, 80), (1, 2048, 8, 80), (1, 4096, 16, None)] if k > 4096 else []
    return [
        dict(BM=bm, BK=bk, STAGES=stages, ROWS=rows, STEP=step, num_warps=warps, maxnreg=registers)
        for (bm, bk, stages), (rows, step, warps, registers) in itertools.product(shapes, rows)
        if rows * k <= 4096 * warps
    ]


def prepare_settings(m: int, k: int) -> list[dict]:
    """The same, and bytes of codes that an unpacking program reads."""
    return [one | dict(UNPACK_BYTES=8192) for one in activation_settings(m, k)]


def product_settings() -> list[dict]:
    """Tiles, stages, warps and programs for each multiprocessor; the order of the tiles."""
    one = dict(TMA=True, PIECES=2, PER_SM=1, BAND=8, num_warps=8)
    two = dict(TMA=True, PIECES=2, PER_SM=2, BAND=16, num_warps=4)
    return [
        one | dict(BM=128, BN=256, BK=128, num_stages=3),
        one | dict(BM=128, BN=256, BK=64, num_stages=5),
        one | dict(BM=256, BN=128, BK=128, num_stages=3),
        one | dict(BM=128, BN=128, BK=128, num_stages=4),
        two | dict(BM=128, BN=128, BK=64, num_stages=4),
        two | dict(BM=128, BN=128, BK=128, num_stages=2),
    ]


def hopper_settings() -> list[dict]:
    """W4A8 in Gluon: the order of the tiles; as many stages as the shared memory of Hopper holds."""
    return [dict(GLUON=True, BM=128, BN=128, BK=128, BAND=band, STAGES=6) for band in (4, 8, 16)]


def w4a4_settings() -> list[dict]:
    """The product of groups: small tiles, several on a multiprocessor, so that sums and scaling overlap."""
    general = dict(TMA=True, BAND=16, PER_SM=2, num_warps=4)
    return [general | dict(BM=64, BN=128, num_stages=3), general | dict(BM=128, BN=64, num_stages=4)]


def w4a4_hopper_settings() -> list[dict]:
    """The same in Gluon, with as many stages as the shared memory of Hopper holds, and one less."""
    return [dict(GLUON=True, BN=128, STAGES=stages, BAND=band) for stages in (5, 4) for band in (4, 8, 16)]


def short_settings(m: int) -> list[dict]:
    """Outputs of a block, pairs of groups that a warp reads ahead, warps. With 56 registers 9 of 4 warps fit."""
    shapes = [(16, 1, 4), (16, 1, 8), (16, 1, 2), (16, 2, 4), (32, 1, 4), (32, 1, 2), (32, 2, 2), (32, 3, 2)]
    rows = (8,) if m <= 8 else (16,) if m <= 16 else (16, 32)
    tried = [dict(BM=bm, BN=bn, AHEAD=ahead, num_warps=warps) for bm in rows for bn, ahead, warps in shapes]
    return [one | dict(maxnreg=None) for one in tried] + [tried[0] | dict(maxnreg=56 if m <= 8 else 72)]


def few_settings(m: int, k: int) -> list[dict]:
    """The same in Gluon, for few rows: warps, stages, programs of a multiprocessor; none where it does not serve."""
    from ..w4.products import product_short_hopper  # a Triton without Gluon has no such settings

    if not product_short_hopper.serves(m, k // GROUP):
        return []
    tried = [(16, 1, 2), (16, 1, 3), (8, 1, 2), (8, 1, 3), (8, 2, 1), (8, 2, 2), (8, 2, 3), (8, 3, 1), (8, 3, 2)]
    tried += [(4, 2, 2), (4, 2, 3), (4, 3, 2), (4, 4, 1), (4, 4, 2), (4, 6, 1)]
    return [
        dict(GLUON=True, num_warps=warps, PER_SM=programs, STAGES=stages, maxnreg=None)
        for warps, programs, stages in tried
    ]


def settings_of(step: str, name: str, m: int, k: int) -> list[dict]:
    """All settings to try of one launch of the kernels called `name`, for m rows of k inputs."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if step == "product":
        if name == INT4:
            return w4a4_settings() + w4a4_hopper_settings() * hopper
        return product_settings() + hopper_settings() * (hopper and name in (FP8, INT8))
    if step == "unpack":
        return [dict(UNPACK_BYTES=size, num_warps=warps) for size in (2048, 4096, 8192, 16384) for warps in (4, 8)]
    if step == "short":
        return short_settings(m) + (few_settings(m, k) if hopper and name == WEIGHT_ONLY else [])
    return prepare_settings(m, k) if step == "prepare" else activation_settings(m, k)
