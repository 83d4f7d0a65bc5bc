"""SplitQuant's split of values: three layers whose sum is the layer, and clusters against all others."""

import itertools

import pytest
import torch
from torch import nn

from helpers import distance, normal
from ptq4dm.errors import UserError
from ptq4dm.transforms.split_values import best_bounds, clusters, split_in_three

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (3, 5, 37)),
    "linear without bias": (lambda: nn.Linear(16, 3, bias=False), (4, 16)),
    "conv": (lambda: nn.Conv2d(5, 11, 3, padding=1), (2, 5, 6, 7)),
    "grouped conv": (lambda: nn.Conv2d(6, 12, (3, 1), stride=2, groups=3, dilation=(1, 2)), (2, 6, 7, 6)),
    "half precision": (lambda: nn.Linear(32, 8).bfloat16(), (4, 32)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_sum_of_three_is_the_layer(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    x = normal(*shape, dtype=layer.weight.dtype)
    before = layer.weight.detach().clone()
    three = split_in_three(layer)
    assert distance(three(x), layer(x)) < (1e-5 if x.dtype == torch.float32 else 1e-2)
    parts = (three.lower, three.middle, three.upper)
    assert torch.equal(sum(part.weight for part in parts), layer.weight)  # each weight is in one of them
    assert all(((part.weight != 0).float().mean() > 0.05) for part in parts)
    if layer.bias is not None:
        assert torch.equal(sum(part.bias for part in parts), layer.bias)
    assert torch.equal(layer.weight, before)


def test_clusters_rise_with_the_value_and_are_those_of_their_scope():
    weight = normal(6, 50)
    whole, own = clusters(weight, by_output=False), clusters(weight, by_output=True)
    assert torch.equal(whole.flatten()[weight.flatten().argsort()].sort().values, whole.flatten().sort().values)
    order = weight.flatten().argsort()
    assert (whole.flatten()[order].diff() >= 0).all()
    for row, ids in zip(weight, own, strict=True):
        assert (ids[row.argsort()].diff() >= 0).all() and torch.equal(ids, clusters(row[None], by_output=False)[0])
    assert not torch.equal(whole, own)


@pytest.mark.parametrize("count", [2, 3])
def test_no_other_clusters_are_much_better(count):
    """Against every way to cut sorted values, on values in clumps and without."""
    for seed in range(12):
        values = normal(14, seed=seed).double() + torch.arange(14) // 5 * (seed % 3)
        found = clusters(values[None], True, count)[0]
        ordered = values.sort().values
        cuts = itertools.combinations(range(1, 14), count - 1)
        error = lambda parts: sum(float((part - part.mean()).square().sum()) for part in parts)  # noqa: E731
        best = min(error(ordered.tensor_split(cut)) for cut in cuts)
        own = error([values[found == number] for number in range(count) if (found == number).any()])
        assert own <= 1.5 * best + 1e-12  # k-means may stay at a place that is not the best
        shares = error(ordered.tensor_split(count))
        assert own <= shares + 1e-12


def test_boundaries_are_half_way_between_means():
    values = torch.tensor([[0.0, 0.2, 5.0, 5.2, 9.0, 9.2]]).double()
    assert torch.allclose(best_bounds(values, 3), torch.tensor([[2.6, 7.1]]).double())


def test_values_that_are_alike_are_one_cluster():
    assert clusters(torch.ones(2, 4), by_output=False).unique().numel() == 1
    assert split_in_three(nn.Linear(4, 3))(normal(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("layer", [nn.Linear(8, 2), nn.Conv1d(4, 4, 1), nn.LayerNorm(8)])
def test_what_is_not_split_is_refused(layer):
    with pytest.raises(UserError, match="3 outputs or more"):
        split_in_three(layer)
