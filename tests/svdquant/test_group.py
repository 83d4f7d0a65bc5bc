"""One group of layers that share an input: its split, its search, and the layers that it becomes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import correlated, normal
from ptq4dm.kernels.formats.int4 import quantize_codes
from ptq4dm.svdquant.group import Group, output, refine, round_rest, search, split_weight, squared_error
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.packing import build_layer
from ptq4dm.transforms.smooth import candidates

pytestmark = pytest.mark.usefixtures("one_thread")


def small_group(rank=8, size=64, n=48, k=128, rows=None, dtype=torch.float16, **plan):
    rows = correlated(256, k) if rows is None else rows
    plan = SVDQPlan(rank=rank, group_size=size, **{"alpha": 0.5, "beta": 0.5, **plan})
    return Group(normal(n, k, seed=7) / 8, rows, rows.abs().amax(0), plan, dtype)


def built(group, layer, split):
    """The layer that `group` of this one layer becomes."""
    layer.weight = nn.Parameter(group.weight.reshape(layer.weight.shape))
    return build_layer(layer, group.plan, split, slice(None), group.dtype, None)


@pytest.mark.parametrize("activation", ["int4", "int8", "fp8", "none"])
@pytest.mark.parametrize("rank", [0, 8])
def test_search_judges_what_the_layer_gives(activation, rank):
    group = small_group(rank, activation=activation)
    split = round_rest(group, split_weight(group, group.divisors(0.5, 0.5)))
    layer = built(group, nn.Linear(128, 48, bias=False), split)
    assert torch.allclose(layer(group.rows), output(group, split, group.rows), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_takes_the_shift_back(bias):
    """With inputs that are not rounded the shifted layer is the unshifted one."""
    rows = F.gelu(correlated(256, 128))
    plain, shifted = (small_group(rows=rows, shift=shift) for shift in (0.0, 0.171875))
    split = split_weight(plain, plain.divisors(0.5, 0.5))
    linear = nn.Linear(128, 48, bias=bias)
    exact, lifted = built(plain, linear, split), built(shifted, linear, split)
    assert lifted.bias is not None and (lifted.bias - (linear.bias if bias else 0)).abs().max() > 0.01
    exact.plan, lifted.plan = (replace(layer.plan, activation="none") for layer in (exact, lifted))
    assert torch.allclose(lifted(rows), exact(rows), atol=1e-4)
    float_layer = lifted.dequantized().float()  # which has neither rounding nor shift
    assert torch.allclose(float_layer(rows), exact(rows), atol=1e-4)
    assert torch.allclose(
        output(shifted, split, rows), lifted_int4(lifted, rows) - (linear.bias if bias else 0), atol=1e-4
    )


def lifted_int4(layer, rows):
    layer.plan = replace(layer.plan, activation="int4")
    return layer(rows)


def test_unsigned_codes_are_finer():
    rows = F.gelu(2 * normal(512, 128, seed=5))
    errors = {}
    for shift in (0.0, 0.171875):
        for rounding in ("nearest", "gptq"):
            group = small_group(rows=rows, shift=shift, rounding=rounding)
            split = round_rest(group, split_weight(group, group.divisors(0.5, 0.5)))
            errors[shift, rounding] = squared_error(output(group, split, rows), rows @ group.weight.T)
    assert errors[0.171875, "nearest"] < 0.7 * errors[0.0, "nearest"]
    assert errors[0.171875, "gptq"] < 0.95 * errors[0.171875, "nearest"]


def test_a_1x1_convolution_is_a_linear_layer():
    group = small_group(shift=0.171875)
    split = split_weight(group, group.divisors(0.5, 0.5))
    bias = nn.Parameter(normal(48))
    layers = [built(group, layer, split) for layer in (nn.Conv2d(128, 48, 1), nn.Linear(128, 48))]
    for layer, kind in zip(layers, (nn.Conv2d, nn.Linear), strict=True):
        assert isinstance(layer, kind) and layer.bias.shape == bias.shape
        layer.bias = bias
    x = normal(2, 128, 3, 5)
    y = layers[0](x)
    assert y.shape == (2, 48, 3, 5) and torch.equal(y.movedim(1, -1), layers[1](x.movedim(1, -1)))
    torch.testing.assert_close(layers[0](x.to(memory_format=torch.channels_last)), y)  # in other memory order
    weights = [layer.dequantized_weight() for layer in layers]
    assert weights[0].shape == (48, 128, 1, 1) and torch.equal(weights[0].flatten(1), weights[1])


# --- one group ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["int4", "int8"])
def test_refinement_goes_on_until_a_turn_is_worse(activation):
    group = small_group(rank=2, activation=activation)
    smooth = group.divisors(0.5, 0.5)
    exact = group.rows @ group.weight.T

    def refined(turns):
        return refine(replace(group, plan=replace(group.plan, refinements=turns)), smooth)

    def error(split):
        return squared_error(output(group, split, group.rows), exact)

    errors = [error(refined(turns)) for turns in range(11)]
    assert errors[0] == error(split_weight(group, smooth))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.02 * errors[9] and errors[9] == errors[10]
    assert error(split_weight(group, smooth, residual=refined(10).residual())) > errors[10]


def test_what_overflows_in_the_search_comes_last():
    group = small_group(alpha=None, beta=None)
    seen = []

    def judge(split):  # the first two of the finalists overflow
        seen.append(split)
        return math.nan if len(seen) < 3 else 1.0

    chosen = search(group, False, judge)
    ranked = search(group, False, None)
    assert len(seen) == 3 and chosen != ranked
    assert torch.equal(group.divisors(*chosen), seen[2].smooth)


def outlier_group(**plan):
    rows = normal(512, 128, seed=5)
    rows[:, 17] *= 60  # one channel takes all of its group's codes
    return small_group(rows=rows, **plan)


def test_search_finds_the_smoothing_of_an_outlier():
    group = outlier_group(rank=4, alpha=None, beta=None)
    alpha, beta = search(group, False, None)
    assert alpha > 0.3
    exact = group.rows @ group.weight.T
    found, none = (
        squared_error(output(group, split_weight(group, group.divisors(*c)), group.rows), exact)
        for c in ((alpha, beta), (0.0, 0.0))
    )
    assert found < 0.5 * none


@pytest.mark.parametrize("judged", ["module", "rows"])
def test_the_exhaustive_search_is_no_worse(judged):
    group = outlier_group(rank=4, alpha=None, beta=None)
    exact = group.rows @ group.weight.T

    def error(split):
        y = output(group, split, group.rows)
        return squared_error(y.softmax(-1), exact.softmax(-1)) if judged == "module" else squared_error(y, exact)

    judge = error if judged == "module" else None
    chosen = [search(group, exhaustive, judge) for exhaustive in (True, False)]
    best, quick = (error(split_weight(group, group.divisors(*choice))) for choice in chosen)
    everything = [error(split_weight(group, group.divisors(*choice))) for choice in candidates(20)]
    assert best == min(everything) and best <= quick


def test_errors_of_16_bit_outputs_do_not_vanish():
    a = torch.full((100,), 1e-4, dtype=torch.float16)
    assert squared_error(a, 0 * a) == pytest.approx(100 * float(a[0]) ** 2, rel=1e-3)
    big = torch.full((4,), 300.0, dtype=torch.float16)
    assert squared_error(big, 0 * big) == 4 * 90000


def test_divisors_and_codes_of_a_16_bit_group_are_16_bit():
    for dtype in (torch.float16, torch.bfloat16):
        group = small_group(dtype=dtype)
        split = split_weight(group, group.divisors(0.5, 0.5))
        for tensor in (split.smooth, split.scales, split.down, split.up):
            assert torch.equal(tensor, tensor.to(dtype).float())
        rest = group.weight * split.smooth - split.up @ (split.down * split.smooth)
        assert torch.equal(split.codes, quantize_codes(rest, split.scales))
