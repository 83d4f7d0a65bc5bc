"""Fits codebooks (kernels/formats/codebook.py): 16 levels and the scales of groups, by alternating least squares.

    min over t, s, q of  sum_{n, k} h[k] (w[n, k] - s[n, g] t[q[n, k]])^2,      h = 1, or the mean square of input k

In turn, each the best for what the others are: the codes q are the nearest levels; each level is the weighted mean of
what has its code (the step of Lloyd and Max); each scale is the least-squares factor of its group. Each lowers the
sum or leaves it. Scales end in minima of their own, so that twice they are searched: from several starts each, and
the best of a group is kept. Levels of a whole weight are fitted on some of its rows, evenly from all, and rounded to
int8; then the scales of all rows are searched under them. h is the diagonal of the Hessian of the output's error,
from calibration; with a hundredth of its mean added, so that a weight whose input was never seen counts too.

A weight with groups of nothing but zeros keeps a level at 0 for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..evidence import LayerEvidence
from ..kernels.formats.codebook import FIRST, LEVELS, LIMIT, CodebookGrid, nearest_codes, operand

ROUNDS = 8
SEARCHED = 2  # the round that searches scales
STARTS = (0.6, 0.7, 0.78, 0.86, 0.94, 1.0, 1.08, 1.18, 1.35)  # of a search, times the scale
LAST = 2  # fits of codes and scales after the last search
SAMPLED = 1 << 18  # weights that the levels of a whole weight are fitted to, at least
DAMPING = 0.01
NORMAL = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)
"""Levels above zero of 16 for a normal distribution of variance 1 (Max 1960, table I): where the fit begins."""
TINY = torch.finfo(torch.float32).tiny


def codebook_grid(
    weight: Tensor,
    group_size: int | None = None,
    by_row: bool = False,
    evidence: LayerEvidence | None = None,
    levels: Tensor | None = None,
) -> CodebookGrid:
    """The codebook grid of least error of a weight [N, K] float.

    group_size: inputs per scale; None gives each output one. by_row: levels of each output, else of the whole weight.
    evidence: what the layer is fed, with rows; then the error of each weight counts by the mean square of its input.
    levels: int8 [1, 16] or, by row, [N, 16], rising: these, and scales alone are fitted.
    """
    n, k = weight.shape
    groups = 1 if group_size is None else k // group_size
    share = _share(evidence, weight).view(1, groups, -1)
    peak = weight.abs().max().float()
    weight = (weight.float() / (peak if peak > 0 else 1.0)).view(n, groups, -1)
    if levels is None:
        part = weight if by_row else weight[:: max(1, weight.numel() // SAMPLED)]
        fit = _Fit(part, share, n if by_row else 1, bool((weight == 0).all(2).any()))
        fit.settle()
        fit = fit if part is weight else fit.of(weight)
    else:
        fit = _Fit(weight, share, len(levels))
        fit.levels = levels.float()
    fit.search_scales()
    for _ in range(LAST):
        fit.fit_scales()
    scales = fit.scales * (peak if peak > 0 else 1.0)
    return CodebookGrid(scales.clamp(min=TINY).view(n, groups), fit.levels.to(torch.int8))


def _share(evidence: LayerEvidence | None, weight: Tensor) -> Tensor:
    """h [K] float32, of mean 1."""
    if evidence is None or evidence.rows is None:
        return torch.ones(weight.shape[1], device=weight.device)
    square = evidence.rows.to(weight.device).double().square().mean(0)
    mean = square.mean()
    return (square / mean + DAMPING).float() if mean > 0 else torch.ones_like(square, dtype=torch.float32)


class _Fit:
    """weight [N, G, C], of largest magnitude 1; share [1, G, C]; scales [N, G, 1]; levels [R, 16], R = 1 or N."""

    def __init__(self, weight: Tensor, share: Tensor, tables: int, pinned: bool = False) -> None:
        self.weight, self.share, self.tables, self.pinned = weight, share, tables, pinned
        self.deviation = weight.square().mean(2, keepdim=True).sqrt()
        self.scales = torch.where(self.deviation > 0, self.deviation * (NORMAL[-1] / LIMIT), 1.0)
        half = torch.tensor(NORMAL, device=weight.device) / NORMAL[-1] * LIMIT
        self.levels = torch.cat([-half.flip(0), half]).expand(tables, -1)
        self._pin()

    def settle(self) -> None:
        """Fit levels and scales; levels are whole numbers from then on, the largest of each table LIMIT."""
        for number in range(ROUNDS):
            self.fit_levels()
            self.search_scales() if number == SEARCHED else self.fit_scales()
        self.levels = self.levels.round().clamp_(-LIMIT, LIMIT)

    def of(self, weight: Tensor) -> _Fit:
        """The same levels for the whole weight, whose scales begin at what they are of deviations here."""
        whole, seen = _Fit(weight, self.share, self.tables), self.deviation > 0
        if seen.any():
            ratio = (self.scales[seen] / self.deviation[seen]).median()
            whole.scales = torch.where(whole.deviation > 0, whole.deviation * ratio, 1.0)
        whole.levels = self.levels
        return whole

    def fit_levels(self) -> None:
        """Each level becomes the mean of what has its code, in units of its scale; one without any stays."""
        slots = self._codes().long() - FIRST
        if self.tables > 1:
            slots = slots + LEVELS * torch.arange(self.tables, device=slots.device)[:, None]
        part = self.share * self.scales
        count = self.tables * LEVELS
        above = _sums(slots.flatten(), (part * self.weight).flatten(), count)
        below = _sums(slots.flatten(), (part * self.scales).expand_as(self.weight).flatten(), count)
        old = self.levels.flatten().double()
        found = torch.where(below > 0, above / torch.where(below > 0, below, 1.0), old)
        self.levels = found.float().view(-1, LEVELS).sort(1).values
        self._pin()
        self._reach()

    def fit_scales(self) -> Tensor:
        """Each scale becomes the factor of least error of its group; where that is none, it stays.

        Returns what this takes off the error of each group, [N, G, 1] float64.
        """
        values = operand(self._codes(), self.levels).view_as(self.weight)
        part = self.share * values
        above = (part * self.weight).sum(2, keepdim=True, dtype=torch.float64)
        below = (part * values).sum(2, keepdim=True, dtype=torch.float64)
        found = (above / torch.where(below > 0, below, 1.0)).float()
        good = found > TINY
        self.scales = torch.where(good, found, self.scales)
        return torch.where(good, above * found, 0.0)

    def search_scales(self) -> None:
        """Each scale becomes the best of those that `fit_scales` makes of several starts; of equals the first."""
        start = best = self.scales
        most = torch.full_like(start, -1.0, dtype=torch.float64)
        for factor in STARTS:
            self.scales = start * factor
            gain = self.fit_scales()
            better = gain > most
            best, most = torch.where(better, self.scales, best), torch.where(better, gain, most)
        self.scales = best

    def _codes(self) -> Tensor:
        return nearest_codes((self.weight / self.scales).flatten(1), self.levels)

    def _reach(self) -> None:
        """The largest level of each table becomes LIMIT, its scales going the other way: int8 is used whole."""
        factor = LIMIT / self.levels.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        self.levels = self.levels * factor
        self.scales = self.scales / factor[:, :, None]

    def _pin(self) -> None:
        """Where groups of zeros need it, the level nearest to 0 is 0."""
        if self.pinned:
            nearest = self.levels.abs().argmin(1, keepdim=True)
            self.levels = self.levels.scatter(1, nearest, 0.0)


def _sums(slots: Tensor, values: Tensor, count: int) -> Tensor:
    """Sums [count] float64 of values by slot, the same to the bit in any order: they are taken of whole numbers."""
    peak = values.abs().max().double()
    unit = peak / 2.0 ** (52 - len(values).bit_length())
    if not peak > 0:
        return values.new_zeros(count, dtype=torch.float64)
    return torch.bincount(slots, weights=(values.double() / unit).round(), minlength=count) * unit
