"""Layers whose input is in parts: against the formula, part by part; what is stored; what is refused."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import correlated, distance, normal
from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.layers.choices import check_choices, check_fit, choices_of
from ptq4dm.layers.fusing.report import why_left
from ptq4dm.layers.plan import Int4Plan, LayerPlan, Plan
from ptq4dm.layers.power import PowerPlan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.split.formats import SPLIT, split_plan
from ptq4dm.layers.stored import check_stored

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (lambda: nn.Linear(96, 11), (3, 5, 96)),
    "linear without bias": (lambda: nn.Linear(96, 11, bias=False), (4, 96)),
    "conv": (lambda: nn.Conv2d(96, 11, 3, padding=1), (2, 96, 5, 6)),
    "strided conv": (lambda: nn.Conv2d(96, 11, (3, 1), stride=2, dilation=(1, 2), bias=False), (2, 96, 7, 6)),
    "conv of one pixel": (lambda: nn.Conv2d(96, 11, 1), (2, 96, 3, 3)),
}
PLANS = {
    "int8": LayerPlan(),
    "W8A6": LayerPlan(activation_bits=6),
    "int4": Int4Plan(),
    "int4 g32 affine": Int4Plan(group_size=32, affine=True),
    "progressive": ProgressivePlan(group_size=32),
    "power": PowerPlan(weight_bits=4, exponent=0.8),
}
SEAMS = {"one": ([32], [1.0, 6.5]), "two, the first part the finer": ([32, 64], [4.0, 1.0, 2.5])}


def case(name, plan, seams):
    """(float layer, its input, whose parts are of unlike size, the plan)."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, (cuts, factors) = make(), seams
    sizes = torch.tensor([b - a for a, b in zip([0, *cuts], [*cuts, 96], strict=True)])
    each = (1 / torch.tensor(factors)).repeat_interleave(sizes).view(-1, *[1] * (layer.weight.ndim - 2))
    offsets = [0] * len(factors) if name == "conv" else [0, 4, -3][: len(factors)]
    plan = replace(plan, input_scale=3.5 / 2 ** (plan.activation_bits - 1), input_zero_point=2)
    return layer, normal(*shape) * each, split_plan(plan, cuts, factors, offsets)


def rounded_by_parts(x, plan, axis):
    """x on the grid of each part, in float64."""
    half = 2 ** (plan.activation_bits - 1)
    found = []
    for part, factor, offset in zip(
        x.tensor_split(plan.seams, axis), plan.input_factors, plan.input_offsets, strict=True
    ):
        scale, zero = plan.input_scale / factor, plan.input_zero_point + offset
        found.append((((part.double() / scale).round() + zero).clamp(-half, half - 1) - zero) * scale)
    return torch.cat(found, axis)


@pytest.mark.parametrize("seams", SEAMS.values(), ids=SEAMS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_each_part_is_on_its_own_grid(name, plan, seams):
    """In float64: inputs rounded part by part, times the weight that the codes stand for."""
    layer, x, plan = case(name, plan, seams)
    quantized = quantized_copy(layer, plan, "layer")
    rounded = rounded_by_parts(x, plan, -1 if layer.weight.ndim == 2 else 1)
    exact = copy.deepcopy(layer).double()
    exact.weight.data = quantized.dequantized_weight().double()
    assert distance(quantized(x), exact(rounded)) < 1e-4  # a value at a tie of rounding may fall to either side
    exact.weight.data = layer.weight.detach().double()
    assert distance(quantized(x), exact(x.double())) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seams", SEAMS.values(), ids=SEAMS)
@pytest.mark.parametrize("plan", ["int8", "W8A6", "progressive"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_gpu_gives_what_the_reference_gives(name, plan, seams):
    layer, x, plan = case(name, PLANS[plan], seams)
    quantized = quantized_copy(layer, plan, "layer")
    right = quantized(x)
    quantized = quantized.cuda()
    assert quantized.kernel_name() != "reference"
    assert distance(quantized(x.cuda()).cpu(), right.double()) < 2e-3


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_is_rounded_in_the_scale_of_its_part(name):
    """Of a row, the part that is fed small inputs has the coarser step, as it matters less."""
    layer, _, plan = case(name, LayerPlan(), SEAMS["one"])
    quantized = quantized_copy(layer, plan, "layer")
    folded = layer.weight.detach().flatten(1).view(11, 96, -1) / torch.tensor([1.0] * 32 + [6.5] * 64)[:, None]
    scale = folded.flatten(1).abs().amax(1) / 127
    assert torch.equal(quantized.weight_scale, scale)
    assert torch.equal(quantized.qweight.flatten(1).view_as(folded), (folded / scale[:, None, None]).round().char())


def test_groups_that_end_at_seams_have_the_codes_of_a_whole_input():
    """Their scales take the factor in; one that float16 multiplies by without rounding."""
    layer, _, plan = case("conv", Int4Plan(group_size=32), ([32], [1.0, 8.0]))
    whole = quantized_copy(layer, Int4Plan(group_size=32), "layer")
    assert torch.equal(quantized_copy(layer, plan, "layer").qweight, whole.qweight)


def test_one_part_like_the_other_is_a_whole_input():
    layer, x, plan = case("linear", LayerPlan(), ([32], [1.0, 1.0]))
    plan.input_offsets = [0, 0]
    whole = quantized_copy(layer, LayerPlan(input_scale=plan.input_scale, input_zero_point=2), "layer")
    assert torch.equal(quantized_copy(layer, plan, "layer")(x), whole(x))


def test_hessian_rounding_sees_the_inputs_that_are_multiplied():
    """Its output error is smaller than that of nearest codes, on inputs in parts."""
    layer = nn.Linear(96, 40, bias=False)
    x = correlated(400, 96) * torch.tensor([1.0] * 32 + [1 / 6.5] * 64)
    errors = {}
    for rounding in ("nearest", "gptq"):
        plan = split_plan(
            Int4Plan(rounding=rounding, input_scale=0.1, input_zero_point=0), [32], [1.0, 6.5], [0, 0]
        )  # fmt: skip
        weight = quantized_copy(layer, plan, "layer", LayerEvidence(x)).dequantized_weight()
        errors[rounding] = distance(x @ weight.T, x @ layer.weight.T)
    assert errors["gptq"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_bytes_are_those_of_the_format_and_a_few_numbers(plan):
    layer, _, split = case("conv of one pixel", plan, SEAMS["one"])
    whole = quantized_copy(layer, replace(plan, input_scale=0.1, input_zero_point=0), "layer")
    sizes = [sum(one.nbytes for one in net.parameters()) for net in (quantized_copy(layer, split, "layer"), whole)]
    assert sizes[0] - sizes[1] == 2 * 4 + 2 * 4 + 11 * 4  # factors, offsets, and what offsets add to 11 outputs


def test_conversion_keeps_what_grids_are_made_of():
    layer, x, plan = case("linear", LayerPlan(), SEAMS["one"])
    quantized = quantized_copy(layer, plan, "layer").to(torch.bfloat16)
    assert (
        quantized.input_factors.dtype == quantized.offset_sums.dtype == quantized.input_scale.dtype == torch.float32
    )
    y = quantized(x.bfloat16())
    assert y.dtype == torch.bfloat16 and distance(y, layer(x)) < 0.03


def test_plans_are_json_and_come_back():
    for plan in PLANS.values():
        _, _, split = case("linear", plan, SEAMS["one"])
        assert choices_of("layer", asdict(split)) == split
        assert "split at 32" in str(split) and SPLIT[type(plan)] is type(split)
    assert str(case("linear", PLANS["W8A6"], SEAMS["one"])[2]) == "W8A6 split at 32 static (simulated)"
    loaded = Plan.from_dict(Plan("method", {"layer": split}).to_dict())
    loaded.check()
    assert loaded.layers == {"layer": split}


WRONG = {
    "seams falling": ({"seams": [5, 3], "input_factors": [1.0] * 3, "input_offsets": [0] * 3}, "rising"),
    "no seam": ({"seams": [], "input_factors": [1.0], "input_offsets": [0]}, "from 1 on"),
    "too few factors": ({"input_factors": [1.0]}, "one number for each part"),
    "a factor of zero": ({"input_factors": [1.0, 0.0]}, "out of"),
    "NaN": ({"input_factors": [1.0, float("nan")]}, "NaN"),
    "an offset beyond all codes": ({"input_offsets": [0, 256]}, "zero point"),
    "dynamic inputs": ({"input_scale": None, "input_zero_point": None}, "static"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_choices_are_refused(name):
    changes, says = WRONG[name]
    plan = split_plan(LayerPlan(input_scale=0.1, input_zero_point=0), [3], [1.0, 2.0], [0, 1])
    check_choices("layer", plan)
    with pytest.raises(UserError, match=says):
        check_choices("layer", replace(plan, **changes))


def test_choices_of_another_layer_are_refused():
    plan = split_plan(LayerPlan(input_scale=0.1, input_zero_point=0), [4], [1.0, 2.0], [0, 1])
    check_fit("layer", plan, nn.Conv2d(6, 4, 1))
    for layer, says in (
        (nn.Linear(4, 4), "channel 4"),
        (nn.Conv2d(6, 6, 1, groups=2), "grouped"),
        (nn.Conv2d(6, 4, 3, padding=1), "pads"),
        (nn.Conv2d(6, 4, 3, padding="same"), "pads"),
    ):
        with pytest.raises(UserError, match=says):
            check_fit("layer", plan, layer)
    check_fit("layer", replace(plan, input_offsets=[0, 0]), nn.Conv2d(6, 4, 3, padding=1))


@pytest.mark.parametrize("name", ["input_factors", "input_offsets"])
def test_files_of_another_grid_are_refused(name):
    layer, _, plan = case("linear", LayerPlan(), SEAMS["one"])
    tensors = dict(quantized_copy(layer, plan, "layer").named_parameters())
    check_stored(quantized_copy(layer, plan, "layer"), tensors)
    with pytest.raises(ValueError, match=name):
        check_stored(quantized_copy(layer, plan, "layer"), tensors | {name: tensors[name] + 1})


def test_fused_kernels_leave_such_layers_and_say_so():
    layer, _, plan = case("conv", LayerPlan(), SEAMS["one"])
    quantized = quantized_copy(layer, plan, "layer")
    assert "in parts (at 32)" in why_left(nn.Sequential(quantized), (type(quantized),))


def test_padding_is_zero_in_all_parts():
    """At the border a window reads what every part has as zero."""
    layer, x, plan = case("conv", LayerPlan(), SEAMS["one"])
    quantized = quantized_copy(layer, plan, "layer")
    inner = copy.deepcopy(layer)
    inner.padding = (0, 0)
    around = quantized_copy(inner, plan, "layer")(F.pad(x, (1, 1, 1, 1)))
    assert distance(quantized(x), around) < 1e-6
