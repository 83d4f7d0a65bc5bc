"""Streaming statistics against brute force on the raw values: exact, in any order, in bounded memory."""

import math

import pytest
import torch

from ptq4dm.calibration.input_statistics import HISTOGRAM_BINS, MOST_BYTES, InputStatistics, check_size
from ptq4dm.errors import UserError


def filled(*tensors, bin_index=0):
    statistics = InputStatistics(1, 2)
    for values in tensors:
        statistics.update(0, bin_index, values)
    return statistics


def counted(values, limit):
    """Counts in HISTOGRAM_BINS half-open bins over [-limit, limit), in float64."""
    width = 2 * limit / HISTOGRAM_BINS
    numbers = torch.floor(values.double().flatten() / width).long() + HISTOGRAM_BINS // 2
    counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
    counts.index_add_(0, numbers, torch.ones_like(numbers))
    return counts


def tricky(seed=0):
    """Tensors of growing range with values on, just below and just above the edges of bins."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.arange(-16, 17) / 16
    close = torch.tensor([-1e-12, 1e-12, 0.0, -0.0, 1e-42, -1e-30, 1.0, -1.0, 0.5, 2.0**-24])
    near = torch.cat([torch.nextafter(edges, edges + way) for way in (1, -1)])
    return [
        torch.randn(50, 40, generator=generator) * 0.01,
        torch.cat([edges, near, close]),
        torch.randn(3, 7, 50, generator=generator),
        torch.randn(30000, generator=generator) * 40,
        torch.tensor([2.0, -4.0, 256.0]),
    ]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True))


def test_equals_brute_force_after_the_range_has_doubled():
    parts = tricky()
    statistics, values = filled(*parts), torch.cat([p.flatten() for p in parts])
    histogram, limit, low, high = statistics.merged(0)
    assert (low, high) == (float(values.min()), float(values.max())) == (float(parts[3].min()), 256.0)
    assert limit == 512  # the least power of two above 256
    assert histogram.dtype == torch.int64 and int(histogram.sum()) == len(values)
    assert torch.equal(histogram, counted(values, limit))
    assert (histogram > 0).sum() > 100


def test_the_order_of_updates_does_not_matter():
    parts = tricky()
    first = filled(*parts)
    assert same(first, filled(*parts[::-1]))
    assert same(first, filled(torch.cat([p.flatten() for p in parts])))
    assert same(first, filled(*(v.reshape(1) for v in parts[4]), *parts[3::-1]))
    assert not same(first, filled(*parts[1:]))


def test_bins_are_kept_apart_and_merged_exactly():
    wide, narrow = tricky()[3], tricky()[1]
    statistics = InputStatistics(2, 3)
    statistics.update(1, 0, wide)
    statistics.update(1, 2, narrow)
    histogram, limit, low, high = statistics.merged(1, [2])
    assert limit == 2 and (low, high) == (-float(narrow.abs().max()), float(narrow.max()))
    assert torch.equal(histogram, counted(narrow, 2))
    histogram, limit, *ends = statistics.merged(1)
    assert torch.equal(histogram, counted(torch.cat([wide, narrow]), limit))
    assert ends == [float(wide.min()), float(wide.max())]
    empty, limit, low, high = statistics.merged(1, [1])  # nothing was seen here, nor by layer 0
    assert not empty.any() and limit > 0 and (low, high) == (math.inf, -math.inf)
    assert not statistics.merged(0)[0].any()


@pytest.mark.parametrize("bound", [0.0, 1e-44, 2.0**-100, 1.0, 3e38])
def test_extreme_magnitudes(bound):
    values = torch.tensor([bound, -bound, bound / 4, 0.0])
    histogram, limit, low, high = filled(values).merged(0)
    assert int(histogram.sum()) == 4 and limit > high == float(values[0]) and low == -high
    assert int(histogram[HISTOGRAM_BINS // 2 :].sum()) == (3 if bound else 4)  # the sides are told apart
    # Merging down to one bin a side: a single value far out.
    histogram, limit, *_ = filled(values / 2, torch.tensor([2.0**60])).merged(0)
    assert int(histogram.sum()) == 5 and int(histogram.argmax()) in range(HISTOGRAM_BINS // 2 - 1, HISTOGRAM_BINS)


def test_an_empty_tensor_adds_nothing():
    """Such as the tokens of an expert that no token went to, or of reference frames that there are none of."""
    one, other = filled(torch.ones(3)), filled(torch.empty(2, 0, 4), torch.ones(3), torch.empty(0))
    assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())


def test_low_precision_inputs_are_counted_as_they_are():
    values = tricky()[3].bfloat16()
    assert same(filled(values), filled(values.float()))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_and_leave_no_trace(wrong):
    statistics = filled(torch.ones(3))
    with pytest.raises(UserError, match="NaN or infinity"):
        statistics.update(0, 0, torch.tensor([5.0, wrong, -7.0]))
    assert same(statistics, filled(torch.ones(3)))


def test_memory_does_not_grow_with_samples():
    def size(statistics):
        return sum(t.nbytes for t in statistics.tensors().values())

    few, many = filled(torch.randn(10)), filled(*torch.randn(50, 10000) * torch.arange(1, 51)[:, None])
    assert size(few) == size(many) == size(InputStatistics(1, 2)) < 2 * (HISTOGRAM_BINS * 8 + 64)
    assert vars(many).keys() == vars(few).keys()


def test_round_trip():
    one = filled(*tricky())
    other = InputStatistics.from_tensors(one.tensors())
    assert same(one, other)
    other.update(0, 1, torch.ones(1))  # a copy, not a view
    assert not same(one, other)


def test_the_memory_of_statistics_is_bounded():
    """Before anything is allocated."""
    most = MOST_BYTES // (30 * HISTOGRAM_BINS * 8)
    check_size(30, most)
    with pytest.raises(UserError, match=rf"30 layers in {most + 1} timestep bins take 4.3 GB .* up to {most} "):
        InputStatistics(30, most + 1)
