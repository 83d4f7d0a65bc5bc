"""Plain 4-bit weights as layers hold them, of odd sizes, with groups that are empty."""

import torch

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
