"""The pieces of SVDQuant, each against what it stands for."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.formats.grid import Grid
from ptq4dm.kernels.formats.int4 import dequantize_groups, pack_int4, quantize_codes, quantize_groups
from ptq4dm.kernels.w4.reference import svdq_linear
from ptq4dm.rounding import gptq
from ptq4dm.svdquant import lowrank
from ptq4dm.svdquant.group import Group, output, refine, round_rest, search, split_weight, squared_error
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.packing import build_layer
from ptq4dm.transforms.smooth import candidates, divisors

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the low-rank branch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1024, 8], ids=["Gram matrix", "randomised"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (160, 160)], ids=str)
def test_top_factors_are_as_good_as_an_svd(shape, limit, monkeypatch):
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", limit)
    u, _, v = torch.linalg.svd(normal(*shape), full_matrices=False)
    values = 0.97 ** torch.arange(min(shape))
    matrix = u * values @ v
    for rank in (1, 8, 20):
        up, down = lowrank.top_factors(matrix, rank)
        assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
        assert (matrix - up @ down).norm() <= 1.01 * values[rank:].norm()
        assert torch.allclose(down @ down.T, torch.eye(rank), atol=1e-4)  # all singular values are in `up`
        assert torch.allclose(up.norm(dim=0), values[:rank], rtol=0.02, atol=1e-4)
        again = lowrank.top_factors(matrix, rank)
        assert torch.equal(up, again[0]) and torch.equal(down, again[1])


def test_the_seed_is_that_of_the_randomised_path(monkeypatch):
    matrix = normal(80, 80)
    assert torch.equal(lowrank.top_factors(matrix, 4, seed=0)[0], lowrank.top_factors(matrix, 4, seed=1)[0])
    monkeypatch.setattr(lowrank, "GRAM_LIMIT", 8)
    assert not torch.equal(lowrank.top_factors(matrix, 4, seed=0)[0], lowrank.top_factors(matrix, 4, seed=1)[0])


@pytest.mark.parametrize("shape", [(6, 64), (64, 6), (16, 16)], ids=str)
def test_as_many_ranks_as_a_matrix_has_are_the_matrix(shape):
    matrix = normal(*shape)
    up, down = lowrank.top_factors(matrix, min(shape))
    assert torch.allclose(up @ down, matrix, atol=1e-4)
    zeros = lowrank.top_factors(torch.zeros(shape), 2)
    assert (zeros[0] @ zeros[1] == 0).all() and zeros[1].isfinite().all()


# --- smoothing ----------------------------------------------------------------------------------------------


def test_divisors_are_the_formula():
    x, w = torch.tensor([4.0, 9.0, 1.0]), torch.tensor([0.25, 0.01, 1.0])
    assert torch.allclose(divisors(x, w, 0.5, 0.5), torch.tensor([4.0, 30.0, 1.0]))
    assert torch.allclose(divisors(x, w, 0.5, 0.0), torch.tensor([2.0, 3.0, 1.0]))
    assert torch.equal(divisors(x, w, 0.0, 0.0), torch.ones(3))


def test_divisors_of_dead_channels_and_extremes():
    nan, inf = float("nan"), float("inf")
    x, w = torch.tensor([0, 1, 2, nan, inf, 1e9, 1e-9]), torch.tensor([1, 0, 0, 1, 1, 1, 1e9])
    assert divisors(x, w, 0.9, 0.1).tolist() == pytest.approx([1, 1, 1, 1, 1, 1e4, 1e-4])
    assert divisors(torch.tensor([0.0, 4.0]), torch.tensor([0.25, 0.0]), 0.0, 0.5).tolist() == [1, 1]
    assert divisors(torch.tensor([4.0, 4.0]), torch.tensor([0.25, 0.0]), 0.5, 0.0).tolist() == [2, 1]


def test_candidates_are_those_of_the_authors():
    choices = candidates(20)
    assert len(choices) == len(set(choices)) == 39 and choices[0] == (0.0, 0.0)
    for alpha, beta in choices[1:]:
        assert 0 < alpha < 1 and (beta == 0 or alpha + beta == pytest.approx(1))
    assert {round(20 * alpha) for alpha, _ in choices} == set(range(20))
    assert set(candidates(10)) <= set(choices)


# --- Hessian rounding ---------------------------------------------------------------------------------------


def correlated(rows, columns, seed=3):
    """Inputs that lie near a plane of a few dimensions."""
    return normal(rows, 8, seed=seed) @ normal(8, columns, seed=seed + 1) + 0.3 * normal(rows, columns, seed=seed + 2)


def gptq_codes(weight, scales, inputs):
    """Codes in [-7, 7] by Hessian rounding."""
    return gptq.gptq(weight, Grid(scales, None, -7, 7), LayerEvidence(inputs))


def test_gptq_beats_rounding_to_nearest():
    weight, inputs = normal(24, 192), correlated(512, 192)  # more columns than one block
    nearest, scales = quantize_groups(weight, 64)
    codes = gptq_codes(weight, scales, inputs)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.abs().max() == 7
    errors = [(inputs @ (weight - dequantize_groups(c, scales)).T).norm() for c in (codes, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_gptq_does_not_depend_on_its_blocks(monkeypatch):
    weight, inputs = normal(5, 96), correlated(200, 96)
    _, scales = quantize_groups(weight, 32)
    found = []
    for block in (1, 7, 96):
        monkeypatch.setattr(gptq, "BLOCK", block)
        found.append(gptq_codes(weight, scales, inputs))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gptq_of_independent_inputs_is_rounding_to_nearest():
    weight = normal(6, 64)
    nearest, scales = quantize_groups(weight, 16)
    assert torch.equal(gptq_codes(weight, scales, torch.diag(normal(64).exp())), nearest)


def test_gptq_damps_a_singular_hessian_until_it_can(monkeypatch):
    inputs = torch.randint(-3, 4, (40, 16), generator=torch.Generator().manual_seed(0)).float()
    inputs[:, 5], inputs[:, 9] = inputs[:, 2], 0  # one column twice, one never fed
    tries, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda h, **kw: tries.append(h) or cholesky(h, **kw))
    weight = normal(4, 16)
    nearest, scales = quantize_groups(weight, 16)
    codes = gptq_codes(weight, scales, inputs)
    errors = [(inputs @ (weight - dequantize_groups(c, scales)).T).norm() for c in (codes, nearest)]
    assert errors[0] < errors[1] and len(tries) == 2
    assert torch.equal(gptq_codes(weight, scales, torch.zeros(3, 16)), nearest)
    monkeypatch.setattr(gptq, "DAMPING", 1e-30)  # too little: it takes more
    tries.clear()
    codes = gptq_codes(weight, scales, inputs)
    assert len(tries) > 4 and codes.abs().max() == 7 and torch.equal(codes[:, 9], nearest[:, 9])


def test_gptq_of_broken_inputs_ends():
    with pytest.raises(UserError, match="NaN or infinity"):
        gptq_codes(normal(2, 16), torch.ones(2, 1), torch.full((4, 16), float("nan")))


# --- the layer ----------------------------------------------------------------------------------------------


def rounded(x, activation, size, unsigned):
    """Activation rounding, one token and group at a time, in float64."""
    if activation == "none":
        return x
    result = x.clone()
    width = size if activation == "int4" else x.shape[-1]
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    e4m3 = e4m3[e4m3.isfinite()]
    for token in result.view(-1, x.shape[-1]):
        for group in token.split(width):
            if activation == "fp8":
                scale = group.abs().max() / 448
                group.copy_(e4m3[(group[:, None] / scale - e4m3).abs().argmin(1)] * scale)
            elif unsigned:
                group.copy_((group / (group.max() / 15)).round().clamp(0, 15) * (group.max() / 15))
            else:
                scale = group.abs().max() / (7 if activation == "int4" else 127)
                group.copy_((group / scale).round() * scale)
    return result


@pytest.mark.parametrize("n, k, size", [(1, 64, 64), (7, 192, 64), (33, 48, 16), (5, 384, 128)])
@pytest.mark.parametrize("activation, shift", [("int4", 0), ("int4", 0.171875), ("int8", 0), ("fp8", 0), ("none", 0)])
@pytest.mark.parametrize("parts", ["all", "no branch", "no smoothing", "no bias"])
def test_layer_is_the_formula(n, k, size, activation, shift, parts):
    x = F.gelu(2 * normal(2, 3, k)) if shift else normal(2, 3, k)
    codes, scales = quantize_groups(normal(n, k, seed=1), size, torch.float16)
    smooth = None if parts == "no smoothing" else normal(k, seed=2).exp()
    down, up = (None, None) if parts == "no branch" else (normal(3, k, seed=3), normal(n, 3, seed=4))
    bias = None if parts == "no bias" else normal(n, seed=5)
    y = svdq_linear(x, pack_int4(codes, size), scales, smooth, down, up, bias, activation, shift)

    inputs = (x.double() + shift) / (1 if smooth is None else smooth.double())
    weight = codes.double() * scales.double().repeat_interleave(size, 1)
    expected = rounded(inputs, activation, size, bool(shift)) @ weight.T
    if down is not None:
        expected += x.double() @ down.double().T @ up.double().T
    if bias is not None:
        expected += bias.double()
    assert y.dtype == x.dtype and y.shape == (2, 3, n)
    assert (y - expected).abs().max() < 2e-5 * expected.abs().max()


def test_layer_answers_in_the_dtype_of_its_input():
    codes, scales = quantize_groups(normal(8, 64), 64, torch.bfloat16)
    operands = (pack_int4(codes, 64), scales, None, None, None, None, "int4")
    x = normal(4, 64).bfloat16()
    y = svdq_linear(x, *operands)
    assert y.dtype == torch.bfloat16 and torch.equal(y, svdq_linear(x.float(), *operands).bfloat16())


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
    float_layer = lifted.dequantized(torch.float32)  # which has neither rounding nor shift
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
    assert torch.equal(layers[0](x.to(memory_format=torch.channels_last)), y)
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
