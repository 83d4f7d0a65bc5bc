"""A layer in training computes what its packed form will: every format, Linear and Conv2d, every kind of input."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import correlated, distance, normal
from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.layers.power import PowerPlan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import empty_quantized, quantized_copy
from ptq4dm.layers.row_mix import RowMixPlan
from ptq4dm.reconstruction.soft import FixedLayer, SoftLayer, is_trainable
from ptq4dm.rounding.learned import Learning
from ptq4dm.rounding.variables import VARIABLES

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = {
    "w8": LayerPlan(),
    "w3 in int8": LayerPlan(weight_bits=3),
    "w6a6": LayerPlan(weight_bits=6, activation_bits=6),
    "int4": Int4Plan(),
    "int4, w3": Int4Plan(weight_bits=3),
    "int4, w2 affine": Int4Plan(weight_bits=2, affine=True),
    "int4, groups": Int4Plan(group_size=32),
    "int4, groups, affine": Int4Plan(group_size=32, affine=True),
    "row-mix": RowMixPlan(wide=[1, 4]),
    "progressive": ProgressivePlan(group_size=32),
    "power": PowerPlan(weight_bits=4, exponent=0.7),
    "power, w8": PowerPlan(),
}
INPUTS = {
    "dynamic": {},
    "static": {"input_scale": 0.03, "input_zero_point": -20},
    "symmetric": {"input_scale": 0.04, "input_zero_point": 0},
    "from zero on": {"input_scale": 0.02, "input_zero_point": -128},
}
LAYERS = {
    "linear": lambda: (nn.Linear(64, 12), normal(5, 7, 64)),
    "linear without bias": lambda: (nn.Linear(64, 12, bias=False), normal(9, 64)),
    "conv": lambda: (nn.Conv2d(32, 12, 3, stride=2, padding=1), normal(2, 32, 9, 8)),
    "dilated": lambda: (nn.Conv2d(32, 12, (3, 1), padding=(2, 0), dilation=2, bias=False), normal(2, 32, 9, 8)),
    "groups": lambda: (nn.Conv2d(64, 12, 3, padding="same", groups=2), normal(2, 64, 6, 6)),
}
ALL = Learning(train=("rounding", "ranges", "scales", "biases"), start="nearest")


def made(kind):
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    return layer.eval(), x


def soft_of(layer, plan, learning=ALL, evidence=None):
    return SoftLayer(layer, empty_quantized(layer, plan, "cpu"), "a.layer", learning, evidence)


def planned(name, inputs="dynamic"):
    plan, grid = PLANS[name], dict(INPUTS[inputs])
    if grid.get("input_zero_point"):
        half = 2 ** (plan.activation_bits - 1)
        grid["input_zero_point"] = max(grid["input_zero_point"], -half)
    return type(plan)(**{**vars(plan), **grid})


@torch.no_grad()
def stirred(soft, seed=0):
    """Let training have moved all that is trained, codes to whole numbers."""
    for i, one in enumerate([*soft.input.ends, *soft.others()]):
        one.add_(normal(max(1, one.numel()), seed=seed + i, scale=0.1).view(one.shape))
    if soft.codes is not None:
        soft.codes.value.add_(normal(*soft.codes.value.shape, seed=seed + 9, scale=0.4))
        soft.codes.project()
    return soft


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_soft_layer_computes_what_the_packed_one_does(kind, name, inputs):
    layer, x = made(kind)
    if name == "row-mix" and kind == "groups":
        return  # such plans are refused
    learning = replace(ALL, train=("rounding", "ranges", "biases")) if name == "progressive" else ALL
    soft = stirred(soft_of(layer, planned(name, inputs), learning))
    with torch.no_grad():
        before = soft.forward(x)
        packed, flips = soft.packed()
        after = packed(x)
    assert 0 < flips < 1 and after.shape == before.shape
    # Scales of groups are stored in 16 bits, and a grid's ends are put on whole zero points.
    assert distance(after, before) < (0.02 if "static" in inputs or "groups" in name else 5e-3)
    assert distance(after, layer(x)) > 0.02  # all that moved shows
    check = getattr(packed, "codes", None)
    assert check is None or check().dtype == torch.int8


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("name", ["w8", "int4, groups, affine", "power"])
def test_hard_codes_alone_are_computed_to_float_tolerance(name, variable):
    layer, x = made("linear")
    soft = stirred(
        soft_of(layer, planned(name, "static"), Learning(variable=variable, train=("rounding",), start="nearest"))
    )
    packed, _ = soft.packed()
    with torch.no_grad():
        if variable == "sigmoid":  # soft until it is packed
            expected = nn.functional.linear(soft.input(x), packed.dequantized_weight(), layer.bias)
        else:
            expected = soft.forward(x)
    assert distance(packed(x).detach(), expected) < 1e-5
    assert (packed.plan.input_scale, packed.plan.input_zero_point) == (0.03, -20) and soft.input.ends == []


@pytest.mark.parametrize("inputs", ["static", "symmetric", "from zero on"])
def test_trained_ends_are_in_the_plan_and_the_layer(inputs):
    layer, _ = made("linear")
    soft = soft_of(layer, planned("int4", inputs))
    plan = soft.packed()[0].plan  # what has not moved stays
    assert plan.input_scale == pytest.approx(INPUTS[inputs]["input_scale"])
    assert plan.input_zero_point == INPUTS[inputs]["input_zero_point"]
    soft = soft_of(layer, planned("int4", inputs))
    with torch.no_grad():
        for end in soft.input.ends:
            end.fill_(0.5)
    plan, old = (packed := soft.packed()[0]).plan, planned("int4", inputs)
    assert plan.input_scale == pytest.approx(old.input_scale * 1.6487, rel=1e-3)  # exp(1/2)
    assert plan.input_zero_point == old.input_zero_point
    assert packed.input_scale.item() == plan.input_scale and packed.input_zero_point.item() == plan.input_zero_point
    assert len(soft.input.ends) == (1 if inputs == "symmetric" else 2)


def test_what_is_not_trained_stays():
    layer, _ = made("linear")
    soft = soft_of(layer, planned("int4", "static"), Learning(train=("ranges",)))
    packed, flips = soft.packed()
    nearest = quantized_copy(layer, planned("int4", "static"), "a.layer")
    assert (
        flips == 0 and torch.equal(packed.qweight, nearest.qweight) and torch.equal(packed.wscales, nearest.wscales)
    )
    assert torch.equal(packed.bias, layer.bias) and soft.others() == [] and soft.codes is None


def test_scales_and_biases_are_trained():
    layer, x = made("linear")
    soft = soft_of(layer, planned("int4"), Learning(train=("scales", "biases"), start="nearest"))
    goal = 1.1 * layer(x).detach() + torch.linspace(-1, 1, 12)
    optimizer = torch.optim.Adam(soft.others(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        (soft.forward(x) - goal).square().mean().backward()
        optimizer.step()
    packed, flips = soft.packed()
    nearest = quantized_copy(layer, planned("int4"), "a.layer")
    assert flips == 0 and distance(packed(x).detach(), goal) < 0.5 * distance(nearest(x).detach(), goal)
    assert torch.allclose(packed.bias - layer.bias, torch.linspace(-1, 1, 12), atol=0.3)
    assert (packed.wscales / nearest.wscales).mean() > 1.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [0.3, 4.0])
def test_a_range_too_narrow_or_too_wide_comes_to_where_it_should(width, symmetric):
    layer, x = made("linear")
    whole = float(x.abs().max()) / 7 * width
    plan = LayerPlan(activation_bits=4, input_scale=whole, input_zero_point=0 if symmetric else -1)
    soft = soft_of(layer, plan, Learning(train=("ranges",)))
    optimizer, goal = torch.optim.Adam(soft.input.ends, 0.03), layer(x).detach()
    before = distance(soft.forward(x), goal)
    for _ in range(60):
        optimizer.zero_grad()
        (soft.forward(x) - goal).square().mean().backward()
        optimizer.step()
    packed, _ = soft.packed()
    assert distance(packed(x).detach(), goal) < 0.6 * before
    assert (packed.plan.input_zero_point == 0) or not symmetric


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("kind", ["linear", "groups"])
def test_training_begins_at_its_start(kind, start):
    layer, _ = made(kind)
    columns = layer.weight[0].numel() * (2 if kind == "groups" else 1)
    evidence = LayerEvidence(correlated(300, columns))
    plan = Int4Plan(rounding=start)
    packed, flips = soft_of(layer, Int4Plan(rounding="learned"), Learning(start=start), evidence).packed()
    assert torch.equal(packed.qweight, quantized_copy(layer, plan, "a.layer", evidence).qweight)
    assert (flips > 0) == (start == "gptq")


def test_codes_that_are_not_whole_are_not_packed():
    layer, _ = made("linear")
    whole = (AssertionError, "no whole number of its grid")
    for wrong, (error, words) in {
        lambda hard: hard + 0.25: whole,
        lambda hard: hard * 0 + 8: whole,
        lambda hard: hard * float("nan"): (UserError, "'a.layer' came to NaN.*a smaller learning_rate"),
    }.items():
        soft = soft_of(layer, planned("int4"))
        hard = soft.codes.hard()
        soft.codes.hard = lambda wrong=wrong, hard=hard: wrong(hard)
        with pytest.raises(error, match=words):
            soft.packed()


def test_gradients_reach_everything_and_inputs_that_are_left_exact():
    for inputs in INPUTS:
        layer, x = made("conv")
        soft = soft_of(layer, planned("int4", inputs))
        x.requires_grad_()
        trained = [soft.codes.value, *soft.input.ends, *soft.others()]
        loss = soft.forward(x).square().mean()
        found = torch.autograd.grad(loss, [*trained, x])
        assert all(one.isfinite().all() for one in found) and found[0].abs().sum() > 0 and found[-1].abs().sum() > 0
        assert layer.weight.grad is None and layer.bias.grad is None
    draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    half, whole = soft.forward(x, draw()), soft.forward(x)
    assert torch.equal(half, soft.forward(x, draw())) and not torch.equal(half, whole)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", PLANS)
def test_gradients_pass_packed_layers(name, inputs):
    layer, x = made("conv")
    packed = quantized_copy(layer, planned(name, inputs), "a.layer")
    fixed = FixedLayer(layer, packed, "a.layer")
    assert torch.equal(fixed.forward(x), packed(x))
    y = fixed.forward(x.requires_grad_())
    assert distance(y, packed(x.detach())) < 2e-3
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0


def test_formats_that_cannot_be_trained_are_told():
    layer, _ = made("linear")
    with pytest.raises(UserError, match="layer 'a.layer' is FP8 dynamic: no gradient passes it"):
        FixedLayer(layer, quantized_copy(layer, LayerPlan("fp8"), "a.layer"), "a.layer")
    formats = ("int8", "int4", "row-mix", "power", "progressive", "fp8", "svdq", "nvfp4")
    trainable = {name for name in formats if is_trainable(name)}
    assert trainable == {"int8", "int4", "row-mix", "power", "progressive"}
