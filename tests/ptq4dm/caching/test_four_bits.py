"""A text's keys and values in 4 bits: what the rounding leaves alone, and what it makes less of."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ptq4dm.caching.four_bits import best_ends, keys_in_4_bits, values_in_4_bits
from ptq4dm.kernels.formats.kv4 import dequantize_kv4, grid_dtype, quantize_kv4

BOTH = [keys_in_4_bits, values_in_4_bits]


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared(x):
    return x.square().sum().item()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 1, 8), (2, 3, 2, 5), (1, 1, 3, 64), (2, 1, 77, 40)], ids=str)
def test_the_format_is_that_of_kv4(function, dtype, shape):
    x = rows(*shape).to(dtype)
    for part, due in zip(function(x), quantize_kv4(x), strict=True):
        assert part.shape == due.shape and part.dtype == due.dtype and part.is_contiguous()


@pytest.mark.parametrize("function", BOTH)
def test_heads_are_rounded_each_by_itself(function):
    x = rows(3, 4, 20, 16)
    for whole, alone in zip(function(x), function(x[1:2, 2:3]), strict=True):
        assert torch.equal(whole[1:2, 2:3], alone)


def test_what_all_keys_share_costs_nothing():
    q, k, v = rows(1, 2, 30, 32), rows(1, 2, 77, 32, seed=1), rows(1, 2, 77, 32, seed=2)
    far = k + 50 * rows(1, 2, 1, 32, seed=3)
    right = scaled_dot_product_attention(q, k, v)
    found = [dequantize_kv4(quantize(one), 32) for quantize in (keys_in_4_bits, quantize_kv4) for one in (k, far)]
    ours, shifted, _, nearest = (squared(scaled_dot_product_attention(q, one, v) - right) for one in found)
    assert shifted == pytest.approx(ours, rel=0.05) and ours < nearest / 100


def test_errors_of_values_cancel_in_their_sum():
    v = rows(4, 8, 77, 64)
    errors = {one: dequantize_kv4(one(v), 64) - v for one in (quantize_kv4, values_in_4_bits)}
    sums = {one: squared(error.sum(-2)) for one, error in errors.items()}
    assert sums[values_in_4_bits] < sums[quantize_kv4] / 8
    assert squared(errors[values_in_4_bits]) < squared(errors[quantize_kv4])
    last = {one: squared(error[..., -1, :]) for one, error in errors.items()}
    assert last[values_in_4_bits] < 1.5 * last[quantize_kv4]


@pytest.mark.parametrize("width", [8, 40, 64, 128])
def test_grids_end_where_the_error_is_least(width):
    x = rows(500, width)
    lows, highs = best_ends(x, torch.float16)
    error = {None: 0.0, "ends": 0.0}
    for name, ends in ((None, None), ("ends", (lows, highs))):
        error[name] = (dequantize_kv4(quantize_kv4(x, ends=ends), width) - x).square().sum(1)
    assert (error["ends"] <= error[None] * 1.001).all() and error["ends"].sum() < 0.93 * error[None].sum()
    assert (lows >= x.amin(1) - 1e-6).all() and (highs <= x.amax(1) + 1e-6).all()


@pytest.mark.parametrize(("words", "bound"), [(77, 0.75), (20, 0.25)], ids=["full", "padded"])
def test_attention_on_them_is_nearer_than_on_the_nearest(words, bound):
    """The more so in a padded prompt, whose other tokens are all alike and have one error, over and over."""
    q, k, v = rows(2, 4, 64, 64), rows(2, 4, 77, 64, seed=1), rows(2, 4, 77, 64, seed=2)
    for one in (k, v):
        one[..., words:, :] = one[..., words : words + 1, :]
    right = scaled_dot_product_attention(q, k, v)
    far = {}
    for name, (keys, values) in {"ours": BOTH, "nearest": (quantize_kv4, quantize_kv4)}.items():
        kv = dequantize_kv4(keys(k), 64), dequantize_kv4(values(v), 64)
        far[name] = squared(scaled_dot_product_attention(q, *kv) - right)
    assert far["ours"] < bound * far["nearest"]


@pytest.mark.parametrize("function", BOTH)
def test_one_value_everywhere_comes_back(function):
    x = torch.full((1, 1, 9, 6), 2.5)
    shift = 2.5 if function is keys_in_4_bits else 0
    assert torch.equal(dequantize_kv4(function(x), 6) + shift, x)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, 1e6])
def test_strange_rows_keep_their_ends_and_come_back_as_nan(strange):
    x = rows(4, 8)
    x[2, 3] = strange
    lows, highs = best_ends(x, grid_dtype(x.dtype))
    back = dequantize_kv4(quantize_kv4(x, ends=(lows, highs)), 8)
    assert back[2].isnan().all() and back[[0, 1, 3]].isfinite().all()
    assert torch.equal(highs[2], x[2].amax()) or strange is torch.nan
