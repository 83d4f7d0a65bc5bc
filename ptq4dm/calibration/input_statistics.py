"""Streaming statistics of layer inputs, one set per layer and timestep bin; memory does not grow with samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError

HISTOGRAM_BINS = 4096
MOST_VALUES = 2**56  # of a bin: no measurement comes so far
LEAST_EXPONENT = -100  # so that the factor to bin numbers is a float32
MOST_BYTES = 4 << 30  # of histograms: 500 layers in 262 bins, 26 layers in 5041


class InputStatistics:
    """Extremes and histogram of the inputs of L layers in T timestep bins.

    low, high: [L, T] float64, exact; +inf, -inf where nothing was seen.
    exponent: [L, T] int32; the histogram of (l, t) has HISTOGRAM_BINS equal bins over [-2^e, 2^e), each with its
        lower end.
    counts: [L, T, HISTOGRAM_BINS] int64.

    When a value falls outside, the range doubles and neighbouring bins merge: the result does not depend on the
    order of updates, so that it can be resumed, merged and repeated bit for bit.
    """

    def __init__(self, num_layers: int, num_bins: int):
        check_size(num_layers, num_bins)
        self.low = torch.full((num_layers, num_bins), math.inf, dtype=torch.float64)
        self.high = torch.full((num_layers, num_bins), -math.inf, dtype=torch.float64)
        self.exponent = torch.full((num_layers, num_bins), LEAST_EXPONENT, dtype=torch.int32)
        self.counts = torch.zeros(num_layers, num_bins, HISTOGRAM_BINS, dtype=torch.int64)

    def update(self, layer: int, bin_index: int, values: Tensor) -> None:
        """Add a tensor of values, of any shape. Raises UserError if one is NaN or infinite."""
        if not values.numel():  # an expert that gets no token
            return
        if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)  # the same values in memory order: no copy
        values = values.detach().reshape(-1).float()
        if not values.numel():  # no token of a kind, no reference frame: nothing to measure
            return
        low, high = (float(v) for v in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError("its input holds NaN or infinity; calibrate a model that gives finite numbers.")
        self.low[layer, bin_index] = min(float(self.low[layer, bin_index]), low)
        self.high[layer, bin_index] = max(float(self.high[layer, bin_index]), high)
        self._widen(layer, bin_index, _exponent(max(-low, high)))
        # Scaling by a power of two and flooring are exact: no value changes sides when bins merge later.
        scaled = values * (HISTOGRAM_BINS / 2 / 2.0 ** int(self.exponent[layer, bin_index]))
        numbers = (scaled.floor_() + HISTOGRAM_BINS // 2).int()
        self.counts[layer, bin_index] += torch.bincount(numbers, minlength=HISTOGRAM_BINS).cpu()

    def merged(self, layer: int, bins: list[int] | None = None) -> tuple[Tensor, float, float, float]:
        """(histogram [HISTOGRAM_BINS], limit, low, high) of one layer over some or all timestep bins."""
        bins = list(range(self.low.shape[1])) if bins is None else bins
        exponent = int(self.exponent[layer, bins].max())
        total = sum(
            _coarser(self.counts[layer, b], exponent - int(self.exponent[layer, b]))
            for b in bins
            if self.counts[layer, b].any()
        )
        if isinstance(total, int):
            total = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
        return total, 2.0**exponent, float(self.low[layer, bins].min()), float(self.high[layer, bins].max())

    def tensors(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high, "exponent": self.exponent, "counts": self.counts}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> InputStatistics:
        """Statistics from what `tensors` gave. Raises ValueError where they cannot be of any measurement."""
        _check(**{name: tensors[name] for name in ("low", "high", "exponent", "counts")})
        statistics = cls(0, 0)
        for name in ("low", "high", "exponent", "counts"):
            setattr(statistics, name, tensors[name].clone())
        return statistics

    def _widen(self, layer: int, bin_index: int, exponent: int) -> None:
        shift = exponent - int(self.exponent[layer, bin_index])
        if shift > 0:
            self.counts[layer, bin_index] = _coarser(self.counts[layer, bin_index], shift)
            self.exponent[layer, bin_index] = exponent


def _check(low: Tensor, high: Tensor, exponent: Tensor, counts: Tensor) -> None:
    """Raises ValueError unless ranges and histograms are of one another."""
    if (
        low.ndim != 2
        or not (low.shape == high.shape == exponent.shape)
        or counts.shape != (*low.shape, HISTOGRAM_BINS)
    ):
        raise ValueError(f"ranges {list(low.shape)} and histograms {list(counts.shape)} do not fit each other")
    if (low.dtype, high.dtype, exponent.dtype, counts.dtype) != (*[torch.float64] * 2, torch.int32, torch.int64):
        raise ValueError("ranges or histograms are of another dtype")
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) < MOST_VALUES:
        raise ValueError("a histogram has negative counts, or more than any measurement")
    seen = counts.sum(-1) > 0
    if not bool(torch.where(seen, low <= high, (low == math.inf) & (high == -math.inf)).all()):
        raise ValueError("a range is empty where values were counted, or not empty where none were")
    low, high, exponent, counts = low[seen], high[seen], exponent[seen], counts[seen]
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("a range holds infinity")
    if not bool(((exponent >= LEAST_EXPONENT) & (exponent <= 128)).all()):
        raise ValueError("a histogram's exponent is out of range")
    limit = torch.ldexp(torch.ones_like(low), exponent)
    if not bool((torch.maximum(-low, high) < limit).all()):
        raise ValueError("a range goes beyond its histogram")
    for ends in (low, high):  # each lies in a bin where something was counted, or beside one: a GPU drops denormals
        middle = (ends * (HISTOGRAM_BINS / 2) / limit).floor().long() + HISTOGRAM_BINS // 2
        near = torch.stack([middle - 1, middle, middle + 1], -1).clamp(0, HISTOGRAM_BINS - 1)
        if not bool(counts.gather(-1, near).any(-1).all()):
            raise ValueError("a range and its histogram are not of the same values")


def check_size(num_layers: int, num_bins: int) -> None:
    """Raises UserError where the statistics of so many layers in so many bins are more than MOST_BYTES."""
    size = num_layers * num_bins * HISTOGRAM_BINS * 8
    if size > MOST_BYTES:
        most = MOST_BYTES // (num_layers * HISTOGRAM_BINS * 8)
        raise UserError(
            f"statistics of {num_layers} layers in {num_bins} timestep bins take {size / 1e9:.1f} GB of memory, and "
            f"at most {MOST_BYTES / 1e9:.1f} GB are allowed; choose num_bins up to {most} (--num-bins)."
        )


def _exponent(bound: float) -> int:
    """The least e >= LEAST_EXPONENT with bound < 2^e."""
    return max(LEAST_EXPONENT, math.frexp(bound)[1]) if bound else LEAST_EXPONENT


def _coarser(counts: Tensor, shift: int) -> Tensor:
    """The same counts in bins 2^shift times as wide, centred."""
    n = len(counts)
    if shift <= 0:
        return counts
    shift = min(shift, int(math.log2(n)))
    if 2**shift >= n:  # all of a side falls into its innermost bin
        result = torch.zeros_like(counts)
        result[n // 2 - 1], result[n // 2] = counts[: n // 2].sum(), counts[n // 2 :].sum()
        return result
    inner = counts.reshape(-1, 2**shift).sum(1)
    side = (n - len(inner)) // 2
    return torch.nn.functional.pad(inner, (side, side))
