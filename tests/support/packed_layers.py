"""4-bit weights as layers hold them: plain ones of odd sizes, with groups that are empty, and progressive ones."""

import torch

from helpers import normal
from ptq4dm.kernels.formats.int4 import pack_int4

SHAPES = [  # N, K, group size (None: one scale a row)
    (5, 27, None), (1, 1, None), (33, 64, None), (3, 130, None), (17, 4224, None),
    (7, 96, 32), (3, 4128, 32), (19, 192, 64), (2, 4160, 64), (5, 384, 128), (130, 256, 128),
]  # fmt: skip


def layer(n, k, group, zeros, dtype=None, seed=0):
    """(codes int8 [N, K], qweight, wscales, wzeros): the second row is zero, and every third group."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group is None else k // group
    low = -8 if zeros else -7
    codes = torch.randint(low, 8, (n, k), generator=generator, dtype=torch.int8)
    wzeros = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8) if zeros else None
    empty = torch.zeros(n, groups, dtype=torch.bool)
    empty[1::7] = True
    empty[:, 2::3] = True
    by_group = codes.view(n, groups, -1)
    by_group[empty] = 0 if wzeros is None else wzeros[empty][:, None]
    scales = torch.exp(torch.randn(n, groups, generator=generator) * 1.5 - 3)
    scales[empty] *= 1000  # a group without codes must not decide
    wscales = scales.to(dtype or (torch.float32 if group is None else torch.bfloat16))
    padded = torch.nn.functional.pad(codes, (0, -k % 64))
    return codes, pack_int4(padded, 64), wscales, wzeros


def whole(low, high, *size, seed=0, dtype=torch.int8):
    """Whole numbers in [low, high]."""
    return torch.randint(low, high + 1, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def packed(codes):
    return pack_int4(torch.nn.functional.pad(codes, (0, -codes.shape[1] % 64)), 64)


def progressive_weight(n, k, groups, seed=0):
    """(codes, wsteps, wzeros) of rows whose 8-bit codes reach both ends of [-119, 119]."""
    w8 = (normal(n, groups, k // groups, seed=seed) * 30).round().clamp(-119, 119)
    w8[:, 0, 0], w8[:, -1, -1] = 119, -119
    low, high = w8.amin(-1), w8.amax(-1)
    steps = ((high - low) / 15).round().clamp(1, 16)
    zeros = (-low / steps).round().clamp(0, 15) - 8
    codes = ((w8 / steps[..., None]).round() + zeros[..., None]).clamp(-8, 7)
    assert ((codes - zeros[..., None]) * steps[..., None]).abs().max() <= 127
    return codes.view(n, k).to(torch.int8), steps.to(torch.int8), zeros.to(torch.int8)
