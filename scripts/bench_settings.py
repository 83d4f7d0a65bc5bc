"""The settings of the kernels that `bench_kernels.py --tune` tries."""

from __future__ import annotations

import itertools

from ptq4dm.kernels.svdq_linear import INT4


def activation_settings() -> list[dict]:
    """BM, BK, KEEP, STAGES, num_warps for few rows, which want few long steps."""
    shapes = [(16, 128, 4, 4), (16, 256, 3, 4), (16, 256, 4, 4), (16, 512, 3, 8), (16, 512, 3, 4), (16, 1024, 2, 8)]
    return [dict(BM=bm, BK=bk, KEEP=0, STAGES=stages, num_warps=warps) for bm, bk, stages, warps in shapes]


def prepare_settings(k: int) -> list[dict]:
    """BM, BK, KEEP, STAGES, warps of the activation's programs; bytes of codes that an unpacking one reads."""
    shapes = [(16, 128, 4, 4), (16, 256, 3, 4), (16, 256, 4, 4), (16, 256, 4, 8), (16, 512, 3, 8), (16, 512, 2, 4)]
    shapes += [(32, 128, 4, 4), (32, 128, 5, 4), (32, 256, 3, 4), (32, 256, 3, 8), (64, 128, 3, 8), (16, 1024, 2, 8)]
    settings = [
        dict(FUSED=True, BM=bm, BK=bk, KEEP=0, STAGES=stages, num_warps=warps, UNPACK_BYTES=size, PDL=False)
        for (bm, bk, stages, warps), size in itertools.product(shapes, (8192, 16384))
        if bk <= k
    ]
    settings += [
        dict(FUSED=True, BM=16, BK=bk, KEEP=-(-k // bk), STAGES=1, num_warps=warps, UNPACK_BYTES=8192, PDL=False)
        for bk, warps in ((128, 4), (256, 8), (512, 8))
        if k <= 1536
    ]
    return settings + [one | dict(FUSED=False, UNPACK_BYTES=4096) for one in settings if one["UNPACK_BYTES"] == 8192]


def product_settings() -> list[dict]:
    """Tiles, stages, warps and programs for each multiprocessor; the order of the tiles; the last wave cut or not."""
    common = dict(TMA=True, PDL=False, PIECES=2, PER_SM=1)
    large = [
        dict(BM=128, BN=256, BK=128, num_stages=3, num_warps=8),
        dict(BM=128, BN=256, BK=64, num_stages=4, num_warps=8),
    ]
    large += [
        dict(BM=128, BN=256, BK=64, num_stages=5, num_warps=8),
        dict(BM=256, BN=128, BK=128, num_stages=3, num_warps=8),
    ]
    settings = [common | one | dict(TAIL=tail, BAND=8) for one in large for tail in (True, False)]
    settings += [common | large[0] | dict(TAIL=True, BAND=band) for band in (4, 16, 64)]
    two = [dict(BK=128, num_stages=2), dict(BK=64, num_stages=4), dict(BK=64, num_stages=3)]
    settings += [common | one | dict(BM=128, BN=128, num_warps=4, PER_SM=2, TAIL=False, BAND=16) for one in two]
    settings += [common | dict(BM=64, BN=256, BK=64, num_stages=3, num_warps=4, PER_SM=2, TAIL=True, BAND=16)]
    settings += [common | dict(BM=128, BN=128, BK=128, num_stages=4, num_warps=8, TAIL=False, BAND=8)]
    return settings


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
        return w4a4_settings() if name == INT4 else product_settings()
    if step == "unpack":
        return [dict(UNPACK_BYTES=size, num_warps=warps) for size in (2048, 4096, 8192, 16384) for warps in (4, 8)]
    if step == "short":
        return short_settings(m)
    return prepare_settings(k) if step == "prepare" else activation_settings()
