"""MixPE: its grid and widths of inputs, and the arithmetic that is its own: scales after the sum of each group."""

import copy

import pytest
import torch
import torch.nn.functional as F

import denoisers
import ptq4dm
from ptq4dm import MixPEConfig, RTNConfig, UserError
from ptq4dm.kernels.formats.int8 import dynamic_scale
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.w4.grouped import grouped_linear
from ptq4dm.layers import int4_ops
from ptq4dm.layers.plan import Int4Plan
from ptq4dm.layers.registry import quantized_copy

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dit():
    return denoisers.pair("dit")[0]


def layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "plan")}


def test_its_codes_are_those_of_round_to_nearest_with_zero_points(dit):
    other = copy.deepcopy(dit)
    ptq4dm.quantize(dit, MixPEConfig(group_size=32))
    ptq4dm.quantize(other, RTNConfig(weight_bits=4, group_size=32, affine=True, activations="dynamic"))
    assert {str(layer.plan) for layer in layers(dit).values()} == {"W4A8 g32 affine dynamic", "W8A8 dynamic"}
    ours, theirs = dit.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_sums_of_groups_are_whole_numbers_and_scales_come_after():
    """What a layer gives, by the paper's formula: integers within a group, one multiplication after it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 24)
    quantized = quantized_copy(layer, Int4Plan(group_size=128, affine=True), "layer")
    x = torch.randn(7, 256)
    scale = dynamic_scale(x, (1,))
    rows = (x * (1 / scale)).round().long().view(7, 2, 128)
    steps = quantized.codes().long().view(24, 2, 128) - quantized.wzeros.long()[:, :, None]
    sums = torch.einsum("mgk,ngk->mng", rows, steps)
    assert sums.abs().max() < 2**22
    y = (sums.double() * quantized.wscales.double()).sum(2) * scale.double() + layer.bias.double()
    kernel = grouped_linear(x, quantized.qweight, quantized.wscales, quantized.wzeros, quantized.bias)
    assert (quantized(x) - y).norm() < 1e-5 * y.norm() and (kernel - y).norm() < 1e-6 * y.norm()


def test_on_a_gpu_the_kernel_is_that_of_scales_after_the_sums():
    """Of Linear layers whose inputs are found in each call; others fold the scales into 8-bit weights, and say so."""
    with settings.target(settings.Target((9, 0), 132, lambda *_: None)):
        name = lambda *more: int4_ops.kernel_name(torch.device("cuda"), *more)  # noqa: E731
        assert name(True, 256, 2, True, False, 8, 1) == "triton-w4a8-grouped"
        assert name(False, 256, 2, True, False, 8, 1) == "unpack + triton-int8"
        assert name(True, 256, 2, True, False, 16, 1) == "unpack + cublas"
        assert name(False, 256, 2, True, False, 16, 1) == "unpack + cudnn"


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_inputs_of_16_bits_are_taken_as_they_are(kind):
    torch.manual_seed(0)
    if kind == "linear":
        layer, x = torch.nn.Linear(256, 24), torch.randn(3, 5, 256)
    else:
        layer, x = torch.nn.Conv2d(128, 12, 3, padding=1), torch.randn(2, 128, 5, 6)
    quantized = quantized_copy(layer, Int4Plan(activation_bits=16, group_size=128, affine=True), "layer")
    weight = quantized.dequantized_weight()
    expected = F.linear(x, weight, layer.bias) if kind == "linear" else F.conv2d(x, weight, layer.bias, padding=1)
    with torch.no_grad():
        assert (quantized(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(torch.compile(quantized, backend="aot_eager", fullgraph=True)(x), quantized(x))
    assert str(quantized.plan) == "W4A16 g128 affine" and quantized.kernel_name() == "reference"


def test_a_model_of_16_bit_inputs_saves_and_loads_to_the_bit(dit, tmp_path):
    ptq4dm.quantize(dit, MixPEConfig(activation_bits=16, group_size=32))
    assert {str(layer.plan) for layer in layers(dit).values()} == {"W4A16 g32 affine", "W8A8 dynamic"}
    dit.save_pretrained(tmp_path)
    loaded = type(dit).from_pretrained(tmp_path)
    ours, theirs = dit.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_training_of_a_layer_leaves_inputs_of_16_bits_alone(kind):
    """SoftInput would round to int8 codes else."""
    from ptq4dm.reconstruction.soft import SoftInput

    plan, x = Int4Plan(activation_bits=16), 1000 * torch.randn(2, 4, 3, 3)
    layer = torch.nn.Linear(3, 2) if kind == "linear" else torch.nn.Conv2d(4, 2, 1)
    assert torch.equal(SoftInput(plan, layer, trained=True)(x), x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation_bits": 6}, "activation_bits must be one of 8, 16; got 6"),
        (
            {"activation_bits": 16, "activations": "static"},
            "inputs of 16 bits stay floats and have no grid.*give activations='dynamic'",
        ),
        ({"group_size": None}, "group_size must be one of 32, 64, 128; got None"),
        ({"affine": False}, "affine is no choice of MixPEConfig, which has True"),
        ({"weight_grid": "progressive"}, "weight_grid is no choice of MixPEConfig"),
        ({"weight_bits": 8}, "weight_bits is no choice of MixPEConfig, which has 4"),
    ],
    ids=str,
)
def test_wrong_options(options, words):
    with pytest.raises(UserError, match=words):
        MixPEConfig(**options)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"activation_bits": 12}, "from 2 to 8 bits"),
        ({"activation_bits": 16, "input_scale": 1.0, "input_zero_point": 0}, "inputs of 16 bits stay floats"),
    ],
    ids=str,
)
def test_plans_out_of_range_are_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        Int4Plan(**choice).check()
    with pytest.raises(ValueError, match="from 2 to 8 bits"):
        ptq4dm.layers.plan.LayerPlan(activation_bits=16).check()
