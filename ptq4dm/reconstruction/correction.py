"""Distribution correction of a block's inputs (PD-Quant, arXiv:2212.07048).

A few calibration tuples have other means and deviations than all that a model sees. The paper moves them until the
statistics of BatchNorm layers fit. Diffusion models have none, so here the statistics are those of all recorded
tuples, by channel and timestep bin, of the block's own input:

    min over x'  (m' - m)^2 + (s' - s)^2 + |x' - x|^2 / (n STRENGTH),    m', s' of x';  m, s of all tuples

has a closed form for each channel, an affine map, where the paper takes 500 steps of Adam on x'. That the statistics
are those of inputs alone, the bins and STRENGTH are our assumptions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..calibration.calls import Calls
from ..calibration.measure import timestep_bins
from ..walk.walk import Walk
from .tuples import first_call

BINS = 10
STRENGTH = 1.0
Moments = dict[tuple[int, int], tuple[Tensor, Tensor]]  # (leaf, bin) -> mean [C] and deviation [C], float64


def moments_of(name: str, reference: Walk) -> Moments:
    """The means and deviations of a block's inputs in full precision, by leaf and timestep bin."""
    sums = _Sums()
    for place, batch in enumerate(reference.batches):
        call = first_call(reference, place, name)
        if call is not None:
            sums.add(batch, pytree.tree_flatten(call)[0])
    return sums.moments()


def corrected(items: list[tuple[Calls, list]], reference: Moments) -> list[list]:
    """The leaves of each call, those that are features of rows moved towards the reference's statistics."""
    sums = _Sums()
    for batch, leaves in items:
        sums.add(batch, leaves)
    own, share, moved = sums.moments(), STRENGTH / (1 + STRENGTH), []
    for batch, leaves in items:
        bins, changed = timestep_bins(batch.time, BINS), list(leaves)
        for i, leaf in enumerate(leaves):
            if not _has_features(leaf, len(bins)):
                continue
            new = _channels_last(leaf).double()
            for row, place in enumerate(_by_row(bins, leaf)):
                if (i, place) not in reference:
                    continue
                (mean, deviation), (m, s) = own[i, place], reference[i, place]
                goal = mean + share * (m - mean), deviation + share * (s - deviation)
                new[row] = (new[row] - mean) * (goal[1] / deviation.clamp(min=1e-12)) + goal[0]
            changed[i] = _channels_back(new, leaf).to(leaf.dtype)
        moved.append(changed)
    return moved


class _Sums:
    """Counts, sums and sums of squares of channels, by leaf and bin."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, int], list[Any]] = {}

    def add(self, batch: Calls, leaves: list) -> None:
        bins = timestep_bins(batch.time, BINS)
        for i, leaf in enumerate(leaves):
            if not _has_features(leaf, len(bins)):
                continue
            rows = _channels_last(leaf).double()
            for row, place in enumerate(_by_row(bins, leaf)):
                values = rows[row].reshape(-1, rows.shape[-1])
                part = self.parts.setdefault((i, place), [0, 0.0, 0.0])
                part[0] += len(values)
                part[1] = part[1] + values.sum(0)
                part[2] = part[2] + values.square().sum(0)

    def moments(self) -> Moments:
        return {
            place: (total / count, (squares / count - (total / count).square()).clamp(min=0).sqrt())
            for place, (count, total, squares) in self.parts.items()
        }


def _has_features(leaf: Any, units: int) -> bool:
    """Whether a leaf holds pixels [R, C, H, W] or tokens [R, S, K] of each unit, one row or several in turn."""
    shaped = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim in (3, 4)
    return shaped and len(leaf) > 0 and len(leaf) % units == 0


def _by_row(bins: Tensor, leaf: Tensor) -> list[int]:
    """The bin of each row of a leaf."""
    return bins.repeat_interleave(len(leaf) // len(bins)).tolist()


def _channels_last(leaf: Tensor) -> Tensor:
    return leaf.movedim(1, -1) if leaf.ndim == 4 else leaf


def _channels_back(values: Tensor, like: Tensor) -> Tensor:
    return values.movedim(-1, 1) if like.ndim == 4 else values
