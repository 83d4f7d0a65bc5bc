"""L1 normalization on codes, forward and backward: the mean magnitude in the place of the standard deviation.

    q = round(x / s),   m = mean q,   a = mean |q - m|
    y = gamma (q - m) s / D + beta,   D = max(c a s, sqrt(eps))

Squares are not needed, nor a root, and the sums are of integers, each in one pass over codes: since those above the
mean are as far from it as those below,

    sum |q - m| = 2 (sum of q above m  -  m times their number)

Backward, dy has codes p of steps t, by stochastic rounding; per channel the sums A of p and B of p q are integers:

    dx = (gamma t p - mean(gamma t p) - c/L T (sign(q - m) - mean sign)) / D,   T = sum gamma t (s/D) (B - m A)

with L values in a group, and no T where eps is D. This is the truth for the kernels of l1.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.int8 import weight_limit

LIMIT = weight_limit(8)
STATS = 5  # m, s/D, D, the share of codes above m, and c/L, which is 0 where eps is D: for each row and group


class Groups(NamedTuple):
    """How [R, P, C] is normalized: each row in `number` groups of channels, of `size` values each."""

    number: int
    size: int

    def over(self, channels: Tensor, reduce: Callable) -> Tensor:
        """Figures of channels [R, C] brought together: [R, groups]."""
        return reduce(channels.view(len(channels), self.number, -1), -1)

    def to_channels(self, figures: Tensor, channels: int) -> Tensor:
        """Figures of groups [R, groups], as they multiply [R, P, C]."""
        if self.number == 1:
            return figures[:, None]
        return figures.repeat_interleave(channels // self.number, 1)[:, None]


def codes_of(x: Tensor, groups: Groups, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes int8, step [R, groups] float32) of x [R, P, C]: one step for each row and group."""
    peak = groups.over(torch.maximum(_down(x, torch.amax), -_down(x, torch.amin)), torch.amax).float()
    step = torch.where(peak < torch.finfo(torch.float32).tiny * LIMIT, 1.0, peak / LIMIT)
    codes = x * groups.to_channels(1.0 / step, x.shape[2])
    codes = codes.round_() if noise is None else codes.add_(noise).floor_()
    return codes.clamp_(-LIMIT, LIMIT).to(torch.int8), step


def normalized(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, number: int, eps: float, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What shift_l1_norm returns, as a formula."""
    groups, channels = Groups(number, x.shape[1] * x.shape[2] // number), x.shape[2]
    codes, step = codes_of(x, groups)
    mean = groups.over(_total(codes), torch.sum) / groups.size
    above = codes > groups.to_channels(mean, channels)
    higher = groups.over(_total(above), torch.sum)
    total = groups.over(_total(codes * above), torch.sum)
    spread = (total - mean * higher) * (2 * ratio / groups.size) * step
    width = spread.clamp_min(math.sqrt(eps))
    unit = step / width
    factor = groups.to_channels(unit, channels)
    factor = factor if gamma is None else factor * gamma.float()
    shift = groups.to_channels(-mean, channels) * factor
    y = torch.addcmul(shift if beta is None else shift + beta.float(), codes, factor)
    hold = torch.where(spread == width, ratio / groups.size, 0.0)
    return y.to(x.dtype), codes, torch.stack([mean, unit, width, higher / groups.size, hold])


def gradient(dy: Tensor, codes: Tensor, stats: Tensor, gamma: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What shift_l1_gradient returns, as a formula; noise [R, P, C] in [0, 1)."""
    mean, unit, width, share, hold = stats
    groups, channels = Groups(stats.shape[2], dy.shape[1] * dy.shape[2] // stats.shape[2]), dy.shape[2]
    wide = functools.partial(groups.to_channels, channels=channels)
    p, step = codes_of(dy, groups, noise)
    sums, products = _total(p), _total(p.to(torch.int16) * codes)
    by_gamma = (products - wide(mean)[:, 0] * sums) * wide(unit * step)[:, 0]
    by_beta = sums * wide(step)[:, 0]
    weight = torch.ones((), device=dy.device) if gamma is None else gamma.float()
    centre = groups.over(weight * by_beta, torch.sum) / groups.size
    pull = groups.over(weight * by_gamma, torch.sum) * hold
    # sign - mean sign is 2 (1 - share) above the mean and -2 share below: the latter everywhere, 2 more above
    above = codes > wide(mean)
    dx = torch.addcmul(wide((2 * share * pull - centre) / width), p, wide(step / width) * weight)
    dx = dx.sub_(above * wide(2 * pull / width)).to(dy.dtype)
    if gamma is None:
        return dx, dx.new_zeros(2, channels, dtype=torch.float32)
    return dx, torch.stack([by_gamma.sum(0), by_beta.sum(0)])


def _down(x: Tensor, reduce: Callable) -> Tensor:
    """[R, P, C] -> [R, C]."""
    return x[:, 0] if x.shape[1] == 1 else reduce(x, 1)


def _total(x: Tensor) -> Tensor:
    """Sums over P of whole numbers, int32 [R, C]."""
    return x[:, 0].to(torch.int32) if x.shape[1] == 1 else x.sum(1, dtype=torch.int32)
