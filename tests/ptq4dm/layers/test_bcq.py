"""Layers with binary-coded weights: rounding and its bound, bytes, saving and loading, what is refused."""

import copy

import pytest
import torch
from torch import nn

from helpers import normal
from ptq4dm.errors import UserError
from ptq4dm.kernels.formats import bcq
from ptq4dm.layers.binary.bcq import BCQPlan
from ptq4dm.layers.choices import check_choices, check_fit
from ptq4dm.layers.registry import empty_quantized, quantized_copy
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.layers.stored import check_stored
from ptq4dm.ranges.weights import weight_grid
from ptq4dm.rounding.gptq import gptq

PLANS = {
    "two": BCQPlan(weight_bits=2, group_size=64),
    "three, a row": BCQPlan(),
    "greedy": BCQPlan(weight_bits=2, group_size=32, rounds=0),
    "uniform": BCQPlan(weight_bits=4, group_size=64, uniform=True),
    "one": BCQPlan(weight_bits=1, group_size=64),
}


def layer(n=70, k=128, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype)


@pytest.mark.parametrize("name", PLANS)
def test_output_is_that_of_the_dequantized_weight(name):
    linear = layer()
    made = quantized_copy(linear, copy.deepcopy(PLANS[name]), "layer")
    x = normal(3, 5, 128)
    weight = made.dequantized_weight()
    right = x.double() @ weight.double().T + linear.bias.double()
    found = made(x)
    assert found.dtype == torch.float32 and found.shape == (3, 5, 70)
    assert (found - right).norm() <= 1e-3 * right.norm()
    bits, group = made.plan.weight_bits, made.plan.group_size
    grid = bcq.BinaryGrid(
        bcq.rows_of(made.wscales, 70), None if made.woffsets is None else bcq.rows_of(made.woffsets, 70)
    )
    assert torch.equal(grid.codes(linear.weight), made.codes())  # nearest to what is stored
    assert int(made.codes().max()) < 2**bits and grid.alphas.shape == (70, 1 if group is None else 128 // group, bits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16, 40])
@pytest.mark.parametrize("name", PLANS)
def test_a_gpu_gives_the_product_with_the_dequantized_weight(name, rows, dtype):
    made = quantized_copy(layer(), copy.deepcopy(PLANS[name]), "layer").to(dtype)
    x = normal(rows, 128).to(dtype)
    right = x.double() @ made.dequantized_weight().double().T + made.bias.double()
    found = made.cuda()(x.cuda())
    assert found.dtype == dtype and "reference" not in str(made.kernel_name())
    assert (found.cpu().double() - right).norm() <= 6e-3 * right.norm()


def test_uniform_is_the_affine_grid():
    linear = layer()
    made = quantized_copy(linear, copy.deepcopy(PLANS["uniform"]), "layer")
    grid = weight_grid(linear.weight, 4, "max", None, 64, True)
    step = grid.scales.amax()
    assert (made.dequantized_weight() - linear.weight).abs().max() <= 0.51 * step
    assert (
        made.codes() != grid.codes(linear.weight) - grid.low
    ).double().mean() < 0.01  # scales are stored in 16 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_planes_and_scales(dtype):
    made = quantized_copy(layer(128, 256, dtype=dtype), BCQPlan(weight_bits=2, group_size=128), "layer")
    assert stored_bytes(made) == 128 * 256 * 2 // 8 + 128 * 2 * 2 * 2 + 128 * dtype.itemsize
    assert made.half().wscales.dtype == torch.float16 and made.bfloat16().wscales.dtype == torch.float16
    assert made.bfloat16()(normal(2, 256).bfloat16()).dtype == torch.bfloat16


def test_weights_too_small_for_float16():
    linear = layer(8, 64)
    linear.weight.data *= 1e-8
    made = quantized_copy(linear, BCQPlan(group_size=32), "layer")
    assert made.wscales.dtype == torch.bfloat16
    left = linear.weight - made.dequantized_weight()
    assert left.norm() < 0.3 * linear.weight.norm()


@pytest.mark.parametrize("name", PLANS)
def test_saved_and_loaded_to_the_bit(name):
    made = quantized_copy(layer(), copy.deepcopy(PLANS[name]), "layer")
    empty = empty_quantized(layer(), made.plan)
    check_stored(empty, made.state_dict())
    empty.load_state_dict(made.state_dict())
    x = normal(4, 128)
    assert torch.equal(made(x), empty(x))


def test_gptq_lowers_the_error_of_outputs():
    """On inputs that are alike; the calibrated rounding of every format serves this one, too."""
    torch.manual_seed(0)
    x = normal(256, 8) @ normal(8, 64)

    class Fed:
        hessian = 2 * x.T @ x / len(x)

    weight = layer(32, 64).weight.detach()
    grid = bcq.fit(weight, 2, 32)
    errors = [(x @ (grid.values(codes) - weight).T).norm() for codes in (gptq(weight, grid, Fed), grid.codes(weight))]
    assert errors[0] < 0.7 * errors[1]


def test_what_a_file_may_not_hold():
    made = quantized_copy(layer(), BCQPlan(group_size=64), "layer")
    empty, tensors = empty_quantized(layer(), made.plan), made.state_dict()
    tensors["wscales"] = -tensors["wscales"]
    with pytest.raises(ValueError, match="'wscales' holds numbers below 0"):
        check_stored(empty, tensors)
    tensors["wscales"] = torch.full_like(tensors["wscales"], float("nan"))
    with pytest.raises(ValueError, match="'wscales' holds NaN"):
        check_stored(empty, tensors)


@pytest.mark.parametrize(
    "choices, text",
    [
        ({"weight_bits": 5}, "1 to 4 bits"),
        ({"weight_bits": 0}, "1 to 4 bits"),
        ({"activation_bits": 8}, "under inputs of 16"),
        ({"group_size": 48}, "none, 32, 64 or 128"),
        ({"rounds": -1}, "rounds is -1"),
        ({"emphasis": 5.0}, "emphasis is 5.0"),
        ({"refits": -1, "rounding": "gptq"}, "refits is -1"),
        ({"refits": 1}, "refits look at what layers are fed"),
        ({"objective": "mse"}, "of uniform grids"),
        ({"input_scale": 1.0, "input_zero_point": 0}, "have no grid"),
    ],
)
def test_choices_that_are_refused(choices, text):
    with pytest.raises(UserError, match=text):
        check_choices("layer", BCQPlan(**choices))


def test_a_layer_whose_inputs_do_not_divide():
    with pytest.raises(UserError, match="do not divide"):
        check_fit("layer", BCQPlan(group_size=64), nn.Linear(96, 8))


def test_no_convolutions():
    with pytest.raises(UserError, match="has no Conv2d"):
        empty_quantized(nn.Conv2d(64, 8, 1), BCQPlan())


def test_nan_names_the_layer():
    linear = layer()
    linear.weight.data[3, 5] = float("nan")
    with pytest.raises(UserError, match="layer 'here' holds NaN"):
        quantized_copy(linear, BCQPlan(), "here")


def test_texts_of_reports():
    assert [str(plan) for plan in PLANS.values()] == [
        "W2A16 bcq g64", "W3A16 bcq", "W2A16 bcq g32 greedy", "W4A16 bcq g64 uniform", "W1A16 bcq g64",
    ]  # fmt: skip
    assert not BCQPlan().simulated
