"""Layers on the power grid: their exponent, their codes and bytes, what they compute, files, refusals."""

import copy

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import correlated, same
from ptq4dm import PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.errors import DamagedFile
from ptq4dm.evidence import LayerEvidence
from ptq4dm.layers.choices import check_choices
from ptq4dm.layers.plan import Int4Plan, LayerPlan, Plan
from ptq4dm.layers.power import EXPONENTS, PowerPlan
from ptq4dm.layers.registry import empty_quantized, quantized_copy
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.layers.stored import check_stored
from ptq4dm.quantization.packing import pack_plan

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = [2, 3, 4, 5, 8]


def linear(outputs=12, inputs=80, bias=True, tails=True):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs) * 0.05)
        if tails:
            layer.weight.copy_(layer.weight.sign() * layer.weight.abs() ** 2 * 9)
    return layer


def conv(**options):
    torch.manual_seed(1)
    return nn.Conv2d(16, 8, 3, padding=1, **options)


def weight_error(layer, plan):
    return float((quantized_copy(layer, plan, "layer").dequantized_weight() - layer.weight.detach()).square().sum())


@pytest.mark.parametrize("bits", WIDTHS)
def test_exponent_one_has_the_weights_of_the_uniform_formats(bits):
    for layer in (linear(), conv(), conv(groups=2)):
        uniform = Int4Plan(weight_bits=bits) if bits <= 4 else LayerPlan(weight_bits=bits)
        found = quantized_copy(layer, PowerPlan(weight_bits=bits, exponent=1.0), "layer")
        assert torch.equal(found.dequantized_weight(), quantized_copy(layer, uniform, "l").dequantized_weight())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("objective", ["max", "mse"])
def test_the_exponent_that_is_found_has_the_least_error(bits, objective):
    choice = {"weight_bits": bits, "objective": objective}
    for layer in (linear(), linear(tails=False), conv(groups=2)):
        plan = PowerPlan(**choice)
        found = quantized_copy(layer, plan, "layer")
        errors = {a: weight_error(layer, PowerPlan(**choice, exponent=a)) for a in EXPONENTS}
        assert errors[found.plan.exponent] == min(errors.values()) and plan.exponent is None
    uniform = weight_error(linear(), PowerPlan(**choice, exponent=1.0))
    assert weight_error(linear(), PowerPlan(**choice)) < 0.95 * uniform  # of weights with long tails


def test_zeros_have_the_uniform_exponent():
    layer = nn.Linear(8, 3)
    nn.init.zeros_(layer.weight)
    found = quantized_copy(layer, PowerPlan(weight_bits=4), "layer")
    assert found.plan.exponent == 1 and not found.dequantized_weight().any()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("bits", [(4, 8), (8, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "strided"])
def test_layers_compute_what_their_codes_stand_for(kind, bits, static):
    layer, x = {
        "linear": (linear(), torch.randn(3, 5, 80)),
        "conv": (conv(), torch.randn(2, 16, 6, 5)),
        "grouped": (conv(groups=4, bias=False), torch.randn(2, 16, 6, 5)),
        "strided": (conv(stride=2), torch.randn(2, 16, 7, 7)),
    }[kind]
    half = 2 ** (bits[1] - 1)
    grid = {"input_scale": 4 / half, "input_zero_point": 5} if static else {}
    quantized = quantized_copy(layer, PowerPlan("power", *bits, **grid), "layer")
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        exact.weight.copy_(quantized.dequantized_weight())
        if static:
            rounded = ((x / (4 / half)).round().add(5).clamp(-half, half - 1) - 5) * (4 / half)
        else:
            dims = (-1,) if kind == "linear" else (1, 2, 3)
            scale = x.abs().amax(dims, keepdim=True) / (half - 1)
            rounded = (x / scale).round() * scale
        expected, found = exact(rounded), quantized(x)
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits_keep_their_grid(dtype):
    for layer, x in ((linear(), torch.randn(2, 80)), (conv(), torch.randn(1, 16, 4, 4))):
        whole = quantized_copy(layer, PowerPlan(weight_bits=4), "layer")
        half = copy.deepcopy(whole).to(dtype)
        assert half(x.to(dtype)).dtype == dtype and half.bias.dtype == dtype
        assert half.wscales.dtype == half.exponent.dtype == torch.float32
        assert torch.equal(half.dequantized_weight(), whole.dequantized_weight())


def test_bytes_are_those_of_the_codes():
    beside = 12 * 4 + 4 + 4  # scales, the exponent, and the number that tells the model's dtype
    for bits in WIDTHS:
        layer = quantized_copy(linear(bias=False), PowerPlan(weight_bits=bits), "layer")
        assert stored_bytes(layer) == 12 * (64 if bits <= 4 else 80) + beside  # 80 inputs in runs of 64: 128


def test_it_says_what_it_is():
    layer = quantized_copy(linear(), PowerPlan(weight_bits=3), "layer")
    assert str(layer.plan) == "W3A8 in 4 bits power dynamic (simulated)" and layer.kernel_name() == "reference"
    assert str(PowerPlan(input_scale=1.0, input_zero_point=0)) == "W8A8 power static (simulated)"


def test_compiled_layers_compute_the_same():
    for layer, x in ((linear(), torch.randn(2, 80)), (conv(stride=2), torch.randn(1, 16, 6, 6))):
        layer = quantized_copy(layer, PowerPlan(weight_bits=4), "layer")
        with torch.no_grad():
            assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_there_is_no_silent_gradient():
    layer = quantized_copy(linear(), PowerPlan(weight_bits=4), "layer")
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(2, 80, requires_grad=True)).sum().backward()


def test_hessian_rounding_gains_in_output_error():
    rows = correlated(400, 144)
    layer = conv()
    error = {}
    for rounding in ("nearest", "gptq"):
        plan = PowerPlan(weight_bits=4, rounding=rounding)
        found = quantized_copy(layer, plan, "layer", LayerEvidence(rows))
        wrong = (found.dequantized_weight() - layer.weight.detach()).flatten(1)
        error[rounding] = float((rows @ wrong.T).square().sum()), found.plan.exponent
    assert error["gptq"][0] < 0.6 * error["nearest"][0] and error["gptq"][1] == error["nearest"][1]


# ------------------------------------------------------------------------------------------------ plans and files


def test_the_completed_plan_gives_the_same_codes():
    model = nn.Sequential(linear(), nn.ReLU(), linear(5, 12))
    first, plan = pack_plan(model, Plan("rtn", {"0": PowerPlan(weight_bits=4), "2": PowerPlan(weight_bits=5)}))
    assert all(choice.exponent in EXPONENTS for choice in plan.layers.values())
    again, same = pack_plan(model, Plan.from_dict(plan.to_dict()))
    assert same == plan and all(torch.equal(first[name].qweight, again[name].qweight) for name in first)


@pytest.mark.parametrize("weight_bits", [3, 8])
def test_a_saved_model_comes_back_to_the_bit(tmp_path, unet, weight_bits):
    model = unet()
    config = RTNConfig(weight_bits=weight_bits, weight_grid="power", first_last="same", activations="dynamic")
    ptq4dm.quantize(model, config)
    assert {str(m.plan).split()[-2] for m in model.modules() if hasattr(m, "plan")} == {"dynamic"}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(model, loaded)
    x = torch.randn(1, 3, model.config.sample_size, model.config.sample_size)
    with torch.no_grad():
        assert torch.equal(model(x, 5).sample, loaded(x, 5).sample)


def stored(plan):
    layer = quantized_copy(linear(), plan, "layer")
    return empty_quantized(linear(), layer.plan, "meta"), dict(layer.state_dict())


@pytest.mark.parametrize(
    ("bits", "changed", "words"),
    [
        (4, {"exponent": torch.tensor(0.5)}, "'exponent' is 0.5 and in the plan"),
        (4, {"exponent": torch.tensor(float("nan"))}, "'exponent' holds NaN"),
        (8, {"wscales": torch.zeros(12, 1)}, "'wscales' holds 0"),
        (3, {"qweight": torch.full((12, 64), 0xFF, dtype=torch.uint8)}, r"'qweight' holds 7, out of \[-3, 3\]"),
        (8, {"qweight": torch.full((12, 80), -128, dtype=torch.int8)}, r"'qweight' holds -128, out of"),
        (8, {"qweight": torch.zeros(12, 80, dtype=torch.uint8)}, "'qweight' is uint8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_files_at_odds_with_their_plan_are_refused(bits, changed, words):
    empty, tensors = stored(PowerPlan(weight_bits=bits, exponent=0.6))
    check_stored(empty, tensors)
    with pytest.raises(ValueError, match=words):
        check_stored(empty, tensors | changed)


def test_a_packed_layer_has_an_exponent():
    empty, tensors = stored(PowerPlan(weight_bits=4))
    empty.plan = PowerPlan(weight_bits=4)
    with pytest.raises(ValueError, match="no 'exponent'"):
        check_stored(empty, tensors)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"exponent": 0.3}, "exponent is 0.3"),
        ({"exponent": float("nan")}, "exponent must be a number"),
        ({"weight_bits": 1}, "from 2 to 8"),
        ({"objective": "output"}, "looks at what the layer is fed"),
    ],
    ids=str,
)
def test_plans_out_of_range_are_refused(choice, words):
    with pytest.raises(DamagedFile, match=words):
        check_choices("layer", PowerPlan(**choice))


@pytest.mark.parametrize(
    "choice", [{"format": "fp8"}, {"weight_bits": 4, "group_size": 64}, {"weight_bits": 4, "affine": True}], ids=str
)
def test_a_recipe_that_no_power_grid_serves_is_refused(choice):
    with pytest.raises(UserError, match="weight_grid='power' goes with other options; give "):
        RTNConfig(weight_grid="power", **choice)


def test_other_refusals_of_recipes():
    with pytest.raises(UserError, match="weight_grid must be one of uniform, power, progressive"):
        RTNConfig(weight_grid="log")
    with pytest.raises(UserError, match="objective 'output' knows nothing"):
        PTQ4DMConfig(weight_grid="power", objective="output")


def test_layers_at_the_ends_stay_uniform(unet):
    model = unet()
    ptq4dm.quantize(model, RTNConfig(weight_bits=4, weight_grid="power", activations="dynamic"))
    assert model.conv_in.plan.format == model.conv_out.plan.format == "int8"
    assert model.time_embedding.linear_1.plan.format == "power"
