"""4-bit weights as the int8 operand of an 8-bit product: what the W8A8 kernels need of a layer stored in 4 bits.

A weight w [N, K] ~ s (q - z): codes q in [-8, 7], scales s and integer zero points z (0 where there are none), one of
each for every 32, 64 or 128 consecutive inputs, or for a whole row. The operand w ~ channel[n] * codes[n, k] is

    a scale a row      channel = s,                       codes = q - z                                  exact
    groups             channel[n] = max_g s[n, g] / P,    codes = round((q - z) * (s[n, g] / channel[n]))

over the groups that hold a code other than zero; round to nearest, halves to even; P = 15 without zero points
(7 * 15 = 105) and 8 with them (15 * 8 = 120). Every step is float32. Of a codebook (formats/codebook.py) the level
t[q] stands in the place of q - z, and P = 1: levels reach to 127.

What is lost: one scale a row and the group of largest scale are exact. Another group is rounded to steps of
channel[n]: each weight is off by at most s_max / (2 P), which is s_max / (2 P s) of the group's own step s; where
s <= s_max / (2 P) its codes of +-1 become 0. Bytes: N K / 2 read, N K written; nothing is kept beside the layer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.codebook import LEVELS, operand
from ..formats.int4 import GROUP, unpack_int4
from ..runtime.late import late
from ..runtime.ops import op

if TYPE_CHECKING:
    from . import int4_codes_triton
else:
    late(globals(), "int4_codes_triton")

GROUP_SIZES = (32, 64, 128)


@op
def int4_codes(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and float32 scales [N] of an 8-bit product, K = inputs.

    qweight: uint8 [N, K' / 2], contiguous, from `formats.int4.pack_int4(codes, 64)`, K' = K up to a multiple of 64,
    filled with codes 0. wscales [N, G] float, wzeros int8 [N, G] in [-8, 7] or None, G = 1 or K / 32, / 64 or / 128.
    levels: int8 [1, 16] or [N, 16] of a codebook, which has no zero points, or None. A row with a scale that is no
    finite number gets the scale NaN where G > 1, as it has where G = 1.

    Raises ValueError for sizes that do not belong together.
    """
    check(qweight.shape, wscales.shape, None if wzeros is None else wzeros.shape, inputs)
    check_levels(qweight, wzeros, levels)
    if qweight.is_cuda and qweight.shape[0]:
        return int4_codes_triton.int4_codes(qweight, wscales, wzeros, inputs, peak(wzeros, levels), levels)
    return reference(qweight, wscales, wzeros, inputs, levels)


@int4_codes.register_fake
def _(qweight, wscales, wzeros, inputs, levels=None):
    return (
        qweight.new_empty(len(qweight), inputs, dtype=torch.int8),
        qweight.new_empty(len(qweight), dtype=torch.float32),
    )


def peak(wzeros: Tensor | None, levels: Tensor | None = None) -> float:
    """P: what the scale of the largest group is in steps of the row."""
    if levels is not None:
        return 1.0
    return 15.0 if wzeros is None else 8.0


def check_levels(qweight: Tensor, wzeros: Tensor | None, levels: Tensor | None) -> None:
    """Raise ValueError for a codebook that does not belong to a weight [N, ...], or has zero points beside it."""
    if levels is None:
        return
    if levels.dtype != torch.int8 or levels.shape not in ((1, LEVELS), (len(qweight), LEVELS)):
        given = f"{list(levels.shape)} {levels.dtype}"
        raise ValueError(f"levels are int8 [1, {LEVELS}] or [{len(qweight)}, {LEVELS}]; got {given}.")
    if wzeros is not None:
        raise ValueError("a codebook has levels and no zero points.")


def steps_of(qweight: Tensor, wzeros: Tensor | None, levels: Tensor | None, inputs: int, groups: int) -> Tensor:
    """q - z, or t[q] of a codebook: int8 [N, G, K / G], on any device."""
    codes = unpack_int4(qweight, GROUP)[:, :inputs]
    if levels is not None:
        return operand(codes, levels).unflatten(1, (groups, -1))
    steps = codes.unflatten(1, (groups, -1))
    return steps if wzeros is None else steps - wzeros[:, :, None]


@functools.lru_cache(maxsize=4096)
def check(qweight: torch.Size, wscales: torch.Size, wzeros: torch.Size | None, inputs: int) -> None:
    """Raise ValueError for shapes that do not belong together; right ones are looked at once."""
    n, wide = qweight[0], -(-inputs // GROUP) * GROUP
    if tuple(qweight) != (n, wide // 2):
        raise ValueError(f"{inputs} inputs are packed as [{n}, {wide // 2}] bytes; got {list(qweight)}.")
    groups = wscales[-1]
    if tuple(wscales) != (n, groups) or (wzeros is not None and tuple(wzeros) != (n, groups)):
        given = list(wscales) if wzeros is None else f"{list(wscales)} and {list(wzeros)}"
        raise ValueError(f"scales, and zero points, are [N, groups] with N = {n}; got {given}.")
    if groups != 1 and (not groups or inputs % groups or inputs // groups not in GROUP_SIZES):
        raise ValueError(f"{inputs} inputs have 1 group, or groups of 32, 64 or 128; got {groups} groups.")


def reference(
    qweight: Tensor, wscales: Tensor, wzeros: Tensor | None, inputs: int, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The codes and scales of `int4_codes` by its formula, on any device."""
    n, groups = wscales.shape
    steps = steps_of(qweight, wzeros, levels, inputs, groups)
    scales = wscales.float()
    if groups == 1:
        return steps.reshape(n, inputs).contiguous(), scales[:, 0].clone()
    finite = scales.isfinite().all(1)
    used = (steps != 0).any(-1)
    channel = torch.where(used & finite[:, None], scales, 0.0).amax(1)
    channel = channel / torch.full_like(
        channel, peak(wzeros, levels)
    )  # a quotient: by a number CUDA multiplies by 1 / P
    channel = torch.where(channel > 0, channel, 1.0)
    ratio = torch.where(finite[:, None], scales / channel[:, None], 0.0)
    codes = torch.where(used[:, :, None], steps * ratio[:, :, None], 0.0).round_().clamp_(-127, 127).to(torch.int8)
    return codes.reshape(n, inputs), torch.where(finite, channel, float("nan"))
