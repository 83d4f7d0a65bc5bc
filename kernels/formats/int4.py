"""The 4-bit formats: symmetric integers under one scale per group of inputs, their packing, and the float e2m1.

    weight      w ~ s * q,    s = max|w| / 7 over the group, rounded to its dtype before q = round(w / s) in [-7, 7]
    activation  x ~ s * q,    s = max|x| / 7 over the group, q = round(x * (1 / s)) in [-7, 7]
                              unsigned: s = max x / 15,      q = round(x * (1 / s)) in [0, 15], negative x at 0
    packed      byte j of a group of G = (q[j] + 8) + 16 * (q[j + G/2] + 8),    0 <= j < G/2
    e2m1        x ~ (-1)^(c // 8) * {0, 0.5, 1, 1.5, 2, 3, 4, 6}[c % 8],    c in [0, 15]

A group is G consecutive inputs of a row; K inputs make K/G groups. Halves go to the even neighbour. A byte holds the
same place of its group's two halves, so that a kernel unpacks two contiguous runs that share one scale. A group of
nothing but zeros gets scale 1. No code stands for NaN or infinity: the codes are 0, and the scale found for the group
is the NaN or infinity, so that all its products are NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact import over

GROUP = 64
"""Inputs of a group that the 4-bit kernels take; packed runs have as many, whatever size groups of scales have."""

HIGH_ROWS = 16
"""Rows of high halves of 8-bit codes are filled up to a multiple of so many, so that rows after them are aligned."""

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Code -> value, float32 [16]. Code 8, minus zero, is read but never written."""

E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def quantize_groups(
    weight: Tensor, group_size: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """weight [N, K] float -> int8 codes [N, K] in [-7, 7] and scales [N, K / group_size] of `dtype`.

    Raises ValueError where K is no multiple of group_size.
    """
    peaks = _groups(weight.float(), group_size).abs().amax(-1)
    scales = _never_zero(over(peaks, 7).to(dtype))
    return quantize_codes(weight, scales), scales


def quantize_codes(weight: Tensor, scales: Tensor, low: int = -7, high: int = 7) -> Tensor:
    """weight [N, K] float under given scales [N, groups] -> int8 codes [N, K] in [low, high].

    Raises ValueError where K is no multiple of the number of groups.
    """
    return _round(_under(weight.float(), scales) / scales.float().unsqueeze(-1), low, high)


def dequantize_groups(codes: Tensor, scales: Tensor) -> Tensor:
    """codes [N, K], scales [N, groups] -> float32 [N, K]. Raises ValueError as `quantize_codes` does."""
    return (_under(codes, scales) * scales.float().unsqueeze(-1)).flatten(-2)


def quantize_activation_groups(x: Tensor, group_size: int, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., K] float -> int8 codes [..., K] and float32 scales [..., K / group_size], found from x itself.

    Raises ValueError where K is no multiple of group_size.
    """
    groups = _groups(x.float(), group_size)
    low, high = (0, 15) if unsigned else (-7, 7)
    peaks = (groups if unsigned else groups.abs()).amax(-1, keepdim=True)
    scales = _never_zero(peaks / high)
    return _round(groups * (1.0 / scales), low, high), scales.squeeze(-1)


def halves(codes: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes c int8 -> two of 4 bits in [-8, 7], high h and low l: c = 16 h + (l + 8)."""
    return codes >> 4, (codes & 15) - 8


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `halves`: int8."""
    return high * 16 + (low + 8)


def high_rows(rows: int) -> int:
    """Rows that the high halves of so many rows of 8 bits take."""
    return -(-rows // HIGH_ROWS) * HIGH_ROWS


def halved(codes: Tensor, wide: Tensor) -> Tensor:
    """Codes int8 [N, K], of 8 bits in the rows `wide` [w] and of 4 in the others -> [high_rows(w) + N, K], all of 4.

    High halves of the wide rows, filled up with rows of zeros; then all rows in their order, of the wide ones the low
    halves.
    """
    high, low = halves(codes[wide])
    return torch.cat([F.pad(high, (0, 0, 0, high_rows(len(wide)) - len(wide))), codes.index_copy(0, wide, low)])


def whole(stored: Tensor, wide: Tensor) -> Tensor:
    """The inverse of `halved`: codes int8 [N, K]."""
    high, low = stored[: len(wide)], stored[high_rows(len(wide)) :]
    return low.index_copy(0, wide, joined(high, low[wide]))


def pack_int4(codes: Tensor, group_size: int) -> Tensor:
    """codes int8 [N, K] in [-8, 7] -> uint8 [N, K / 2].

    Raises ValueError where group_size is odd, K is no multiple of it, or a code has no nibble.
    """
    half = _half(group_size)
    if codes.numel():
        low, high = (int(v) for v in torch.aminmax(codes))
        if low < -8 or high > 7:
            raise ValueError(f"4-bit codes lie in [-8, 7]; got codes from {low} to {high}.")
    nibbles = (_groups(codes, group_size) + 8).to(torch.uint8)
    return (nibbles[..., :half] | nibbles[..., half:] << 4).flatten(-2)


def unpack_int4(packed: Tensor, group_size: int) -> Tensor:
    """packed uint8 [N, K / 2] -> int8 codes [N, K] in [-8, 7]. Raises ValueError for sizes `pack_int4` refuses."""
    groups = _groups(packed, _half(group_size))
    return torch.cat([groups & 15, groups >> 4], -1).flatten(-2).to(torch.int8) - 8


def quantize_e2m1(x: Tensor) -> Tensor:
    """x float, any shape -> uint8 codes of the nearest values; ties to the smaller magnitude, beyond 6 to 6.

    What rounds to zero, and NaN, gets code 0.
    """
    magnitude = x.float().abs()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint in E2M1_MIDPOINTS:  # a third of the time of torch.bucketize, and NaN passes none
        codes += magnitude > midpoint
    return torch.where((x < 0) & (codes > 0), codes + 8, codes)


def dequantize_e2m1(codes: Tensor) -> Tensor:
    """codes 0..15, any shape and integer dtype -> float32 of the same shape."""
    return E2M1.to(codes.device)[codes.int()]


def _groups(x: Tensor, size: int) -> Tensor:
    """[..., K] -> [..., K / size, size]."""
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} columns do not divide into groups of {size}.")
    return x.unflatten(-1, (x.shape[-1] // size, size))


def _under(x: Tensor, scales: Tensor) -> Tensor:
    """x [..., K] -> [..., groups, K / groups], with the number of groups that scales [..., groups] has."""
    columns, groups = x.shape[-1], scales.shape[-1]
    if columns % groups:
        raise ValueError(f"{columns} columns do not divide into {groups} groups, one for each scale.")
    return x.unflatten(-1, (groups, columns // groups))


def _half(group_size: int) -> int:
    if group_size < 2 or group_size % 2:
        raise ValueError(f"a packed group has two halves, so its size is even; got {group_size}.")
    return group_size // 2


def _never_zero(scales: Tensor) -> Tensor:
    return torch.where(scales.float() < torch.finfo(torch.float32).tiny, 1.0, scales)


def _round(steps: Tensor, low: int, high: int) -> Tensor:
    """steps [..., groups, size] float, overwritten -> int8 codes [..., groups * size]."""
    return steps.round_().clamp_(low, high).nan_to_num_(0.0).to(torch.int8).flatten(-2)
