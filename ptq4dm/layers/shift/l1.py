"""L1 normalization on codes, forward and backward: the mean magnitude in the place of the standard deviation.

    q = round(x / s),   m = mean q,   a = mean |q - m|
    y = gamma (q - m) s / D + beta,   D = max(c a s, sqrt(eps)),   c = sqrt(pi / 2)

Of Gaussian values c mean |x - m| is the standard deviation, so that a model trained with GroupNorm or LayerNorm keeps
nearly its function. A transformer's tokens have channels far out, and c is greater: `ratios` of norms.py measures it
for each norm. Squares are not needed, nor a root, and the sums are of integers, each in one pass over codes:
since those above the mean are as far from it as those below,

    sum |q - m| = 2 (sum of q above m  -  m times their number)

Backward, dy has codes p of steps t, by stochastic rounding; per channel the sums A of p and B of p q are integers:

    dx = (gamma t p - mean(gamma t p) - c/L T (sign(q - m) - mean sign)) / D,   T = sum gamma t (s/D) (B - m A)

"Towards Accurate and Efficient Sub-8-Bit Integer Training" (arXiv:2411.10948) replaces the norm and quantizes it.
Our assumptions: c, measured or not; codes of 8 bits with a step for each normalized group, for nothing is summed
beyond one; eps as a floor of D, which changes no group above it. Gradients by gamma and beta are float32 sums over
groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.formats.int8 import weight_limit
from .noise import uniform

RATIO = math.sqrt(math.pi / 2)
BITS = 8


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


def codes_of(x: Tensor, groups: Groups, noise: Tensor | None = None, bits: int = BITS) -> tuple[Tensor, Tensor]:
    """(codes int8, step [R, groups] float32) of x [R, P, C]: one step for each row and group."""
    limit = weight_limit(bits)
    peak = groups.over(torch.maximum(_down(x, torch.amax), -_down(x, torch.amin)), torch.amax).float()
    step = torch.where(peak < torch.finfo(torch.float32).tiny * limit, 1.0, peak / limit)
    codes = x * groups.to_channels(1.0 / step, x.shape[2])
    codes = codes.round_() if noise is None else codes.add_(noise).floor_()
    return codes.clamp_(-limit, limit).to(torch.int8), step


class L1Norm(torch.autograd.Function):
    """x [R, P, C] float, normalized over P and each of so many groups of C; gamma, beta [C] float, both or neither ->
    x's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, number: int, eps: float, ratio: float
    ) -> Tensor:
        groups, channels = Groups(number, x.shape[1] * x.shape[2] // number), x.shape[2]
        codes, step = codes_of(x, groups)
        mean = groups.over(_total(codes), torch.sum) / groups.size
        above = codes > groups.to_channels(mean, channels)
        higher = groups.over(_total(above), torch.sum)
        total = groups.over(_total(codes * above), torch.sum)
        spread = (total - mean * higher) * (2 * ratio / groups.size) * step
        width = spread.clamp_min(math.sqrt(eps))
        unit = step / width
        ctx.save_for_backward(codes, mean, unit, width, spread == width, higher / groups.size, gamma)
        ctx.groups, ctx.ratio, ctx.types = groups, ratio, (x.dtype, None if gamma is None else gamma.dtype)
        factor = groups.to_channels(unit, channels)
        factor = factor if gamma is None else factor * gamma.float()
        shift = groups.to_channels(-mean, channels) * factor
        y = torch.addcmul(shift if beta is None else shift + beta.float(), codes, factor)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        codes, mean, unit, width, free, share, gamma = ctx.saved_tensors
        groups, dy = ctx.groups, gradients[0]
        wide = functools.partial(groups.to_channels, channels=dy.shape[2])
        p, step = codes_of(dy, groups, uniform(dy))
        sums, products = _total(p), _total(p.to(torch.int16) * codes)
        by_gamma = (products - wide(mean)[:, 0] * sums) * wide(unit * step)[:, 0]
        by_beta = sums * wide(step)[:, 0]
        weight = torch.ones((), device=dy.device) if gamma is None else gamma.float()
        centre = groups.over(weight * by_beta, torch.sum) / groups.size
        pull = torch.where(free, groups.over(weight * by_gamma, torch.sum) * (ctx.ratio / groups.size), 0.0)
        # sign - mean sign is 2 (1 - share) above the mean and -2 share below: the latter everywhere, 2 more above
        above = codes > wide(mean)
        dx = torch.addcmul(wide((2 * share * pull - centre) / width), p, wide(step / width) * weight)
        dx = dx.sub_(above * wide(2 * pull / width)).to(ctx.types[0])
        if gamma is None:
            return dx, None, None, None, None, None
        kind = ctx.types[1]
        return dx, by_gamma.sum(0).to(kind), by_beta.sum(0).to(kind), None, None, None


def _down(x: Tensor, reduce: Callable) -> Tensor:
    """[R, P, C] -> [R, C]."""
    return x[:, 0] if x.shape[1] == 1 else reduce(x, 1)


def _total(x: Tensor) -> Tensor:
    """Sums over P of whole numbers, int32 [R, C]."""
    return x[:, 0].to(torch.int32) if x.shape[1] == 1 else x.sum(1, dtype=torch.int32)
