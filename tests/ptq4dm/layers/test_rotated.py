"""Layers of rotated inputs: the function stays, codes are those of the formula, plans are kept; what is refused."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler
from torch import nn

import ptq4dm
from helpers import correlated, distance, normal, run, same
from models import dit
from ptq4dm.errors import UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.hooks import hooked
from ptq4dm.kernels.formats.int8 import dynamic_scale
from ptq4dm.kernels.formats.rotation import rotate
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.choices import check_choices, check_fit, choices_of
from ptq4dm.layers.codebook import CodebookPlan
from ptq4dm.layers.plan import Int4Plan, LayerPlan, Plan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import empty_quantized, quantized_copy
from ptq4dm.layers.rotated.choices import ROTATED
from ptq4dm.quantization.transforming import transformed, turns_of
from ptq4dm.transforms.base import TRANSFORMS

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (lambda: nn.Linear(96, 11), (3, 5, 96)),
    "linear without bias": (lambda: nn.Linear(96, 11, bias=False), (4, 96)),
    "conv": (lambda: nn.Conv2d(96, 11, 3, padding=1), (2, 96, 5, 6)),
    "strided conv": (lambda: nn.Conv2d(96, 11, (3, 1), stride=2, dilation=(1, 2), bias=False), (2, 96, 7, 6)),
    "conv of one pixel": (lambda: nn.Conv2d(96, 11, 1), (2, 96, 3, 3)),
    "grouped conv": (lambda: nn.Conv2d(192, 8, 3, padding=1, groups=2), (2, 192, 5, 5)),
}
PLANS = {
    "int8": LayerPlan(),
    "W8A6": LayerPlan(activation_bits=6),
    "fp8": LayerPlan("fp8"),
    "int4": Int4Plan(),
    "int4 g32 affine": Int4Plan(group_size=32, affine=True),
    "progressive": ProgressivePlan(group_size=32),
    "codebook": CodebookPlan(group_size=32),
}
KINDS = [(32, "sylvester"), (16, "regular")]


def rotated_plan(plan, group, kind):
    return ROTATED[type(plan)](plan, group, kind)


def product(layer, x, weight, bias):
    """A layer's product in float64."""
    x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def turned(layer, x, group, kind):
    return (
        rotate(x, group, kind)
        if isinstance(layer, nn.Linear)
        else rotate(x.movedim(1, -1), group, kind).movedim(-1, 1)
    )


@pytest.mark.parametrize("group, kind", KINDS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_function_stays(name, plan, group, kind):
    """In floats: the rotated weight times the rotated input is the product; the matrix that is rounded goes back."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), normal(*shape)
    packed = empty_quantized(layer, rotated_plan(plan, group, kind))
    weight = layer.weight.detach()
    folded = turned(layer, weight, group, kind)
    exact = product(layer, x, weight, layer.bias)
    torch.testing.assert_close(
        product(layer, turned(layer, x, group, kind), folded, layer.bias), exact, rtol=1e-5, atol=1e-5
    )
    assert distance(product(layer, x, folded, layer.bias), exact) > 0.3
    torch.testing.assert_close(packed.shaped(packed.matrix(weight)), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.matrix(weight), packed.columns(folded), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["linear", "conv", "strided conv", "grouped conv"])
def test_what_rounders_see_is_the_rotated_input(name, plan):
    """Rows of windows times the matrix that is rounded: the layer's own outputs."""
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    packed = empty_quantized(layer, rotated_plan(plan, 32, "sylvester"))
    width = layer.weight[0].numel()
    groups = getattr(layer, "groups", 1)
    rows = normal(7, groups * width)
    found = [fed.rows @ matrix.T for matrix, _, fed in packed.parts(layer.weight.detach(), LayerEvidence(rows))]
    weights = layer.weight.detach().flatten(1).chunk(groups)
    exact = [part @ weight.T for part, weight in zip(rows.split(width, 1), weights, strict=True)]
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(exact, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group, kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "conv", "conv of one pixel"])
def test_codes_are_those_of_the_formula(name, group, kind):
    """y = Q(x H) Q(W H)^T + b, in float64; dynamic scales of tokens, and of samples."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), normal(*shape)
    packed = quantized_copy(layer, rotated_plan(LayerPlan(), group, kind), "layer")
    v, w = turned(layer, x, group, kind), turned(layer, layer.weight.detach(), group, kind)
    scale = dynamic_scale(v, (-1,) if isinstance(layer, nn.Linear) else (1, 2, 3))
    steps = w.flatten(1).abs().amax(1).view(-1, *[1] * (w.ndim - 1)) / 127
    exact = product(layer, (v / scale).round() * scale, (w / steps).round() * steps, layer.bias)
    torch.testing.assert_close(packed(x).double(), exact, rtol=1e-4, atol=1e-4)
    back = product(layer, x, packed.dequantized_weight(), layer.bias)
    assert distance(back, product(layer, x, layer.weight, layer.bias)) < 0.02


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_outliers_of_a_channel_cost_less(name, dtype, plan):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), normal(*shape)
    (x[..., 5] if isinstance(layer, nn.Linear) else x[:, 5]).mul_(60)
    x = x.to(dtype)
    exact = product(layer, x, layer.weight, layer.bias)
    plain = quantized_copy(layer, plan, "layer")
    packed = quantized_copy(layer, rotated_plan(plan, 32, "sylvester"), "layer")
    y = packed(x)
    assert y.dtype == dtype and y.shape == exact.shape
    if plan.format == "int8":  # steps of fp8 grow with the value; of uniform weights 4 bits lose by a rotation
        assert distance(y, exact) < 0.9 * distance(plain(x), exact)


TOKENS = {
    "int8": LayerPlan(),
    "fp8": LayerPlan("fp8"),
    "int4 g64": Int4Plan(group_size=64),
    "progressive": ProgressivePlan(group_size=64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", TOKENS.values(), ids=TOKENS)
def test_codes_and_their_product_are_the_layer(plan, dtype):
    """In two steps, as kernels on a GPU take them: the same as in one, but for where bfloat16 is rounded."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 24).to(dtype)
    packed = quantized_copy(layer, rotated_plan(plan, 64, "regular"), "layer")
    x = normal(3, 7, 128, dtype=dtype)
    y = packed.of_codes(packed.encode(x, None, dtype))
    assert y.dtype == dtype and y.shape == (3, 7, 24)
    assert distance(y, packed(x)) < (1e-3 if dtype == torch.float32 else 6e-3)
    assert packed.codes_key() is None and not packed.rotates_in_codes  # without a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", TOKENS.values(), ids=TOKENS)
def test_one_kernel_rotates_and_quantizes_on_a_gpu(plan, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(512, 96).to(dtype)
    packed = quantized_copy(layer, rotated_plan(plan, 64, "regular"), "layer")
    x = normal(3, 70, 512, dtype=dtype)
    x[..., 5] *= 40
    due = packed(x.float())
    moved = packed.cuda()
    assert moved.rotates_in_codes and "rotation" not in moved.kernels_text()
    assert distance(moved(x.cuda()), due) < (0.02 if plan.format == "fp8" else 0.012)
    assert distance(moved(x.float().cuda()), due) < 0.012  # of floats the rotation is a product of torch


def test_rounding_sees_rotated_inputs():
    """GPTQ on inputs near a plane takes more off than rounding to nearest leaves."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(96, 32), correlated(200, 96)
    exact = layer(rows)
    errors = [
        distance(
            quantized_copy(
                layer,
                replace(rotated_plan(Int4Plan(group_size=32), 32, "sylvester"), rounding=how),
                "layer",
                LayerEvidence(rows),
            )(rows),
            exact,
        )
        for how in ("nearest", "gptq")
    ]
    assert errors[1] < 0.8 * errors[0]


# --- models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hadamard:16", "sylvester", "sylvester:32"])
def test_the_function_of_a_model_stays(unet, text):
    """Every layer that is found: its weight rotated in place, its input by what static grids are measured behind."""
    model = unet().eval()
    expected, kind = run(model), text.partition(":")[0]
    plans, _ = transformed(model, [text], None, None)
    assert same(model, unet())  # the float model itself is left alone
    turns = turns_of(model, plans)
    assert len(turns) > 10
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for plan in plans:
            for name in plan.modules:
                layer = folded.get_submodule(name)
                layer.weight.copy_(turned(layer, layer.weight, plan.options["group"], plan.options["kind"]))
    assert distance(run(folded), expected) > 0.1
    with hooked(folded, {name: _through(turn) for name, turn in turns.items()}):
        torch.testing.assert_close(run(folded), expected, rtol=1e-5, atol=1e-5)
    assert {plan.kind for plan in plans} == {kind}


def _through(turn):
    return lambda module, args, kwargs: ((turn(args[0]), *args[1:]), kwargs)


@pytest.fixture(scope="module")
def store(unet):
    pipe = DDPMPipeline(unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=4, num_inference_steps=3))


RECIPES = {
    "int8 static": lambda **more: ptq4dm.RTNConfig(**more),
    "int8 dynamic": lambda **more: ptq4dm.RTNConfig(activations="dynamic", **more),
    "fp8 static": lambda **more: ptq4dm.RTNConfig(format="fp8", **more),
    "int4 gptq": lambda **more: ptq4dm.PTQ4DMConfig(weight_bits=4, rounding="gptq", **more),
    "progressive": lambda **more: ptq4dm.RTNConfig(
        weight_bits=4, weight_grid="progressive", activations="dynamic", **more
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_saved_and_plans_followed(unet, store, name, tmp_path):
    """Every recipe takes the transform; the report says which layers it rotates; nothing is lost in files."""
    model = unet()
    report = ptq4dm.quantize(model, RECIPES[name](transforms=("hadamard:16",)), store)
    packed = {n: layer for n, layer in model.named_modules() if is_quantized(layer)}
    rotated = {n for n, layer in packed.items() if "rotated" in layer.plan.format}
    divides = {n for n, layer in packed.items() if layer.weight_shape[1] % 16 == 0}
    assert rotated == divides and len(rotated) > 10
    assert {row["layer"] for row in report.layers if "hadamard 16" in row["format"]} == rotated
    assert all(row["kernel"].startswith("rotation + ") for row in report.layers if row["layer"] in rotated)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert same(loaded, model) and torch.equal(run(loaded), run(model))
    plan = ptq4dm.quantization_config(model).plan
    plan.save(tmp_path / "plan.json")
    again = unet()
    config = RECIPES[name]()
    config.plan = Plan.load(tmp_path / "plan.json")
    ptq4dm.quantize(again, config, store)
    assert same(again, model)


def test_static_grids_hold_what_is_rotated(unet, store):
    """Measured behind the rotation: no value of the calibration calls is clipped by a grid of largest values."""
    plain, model = unet(), unet()
    ptq4dm.quantize(plain, ptq4dm.RTNConfig(), store)
    ptq4dm.quantize(model, ptq4dm.RTNConfig(transforms=("hadamard:16",)), store)
    exact, seen = unet().eval(), {}
    plans = ptq4dm.quantization_config(model).plan
    turns = turns_of(exact, plans.transforms)

    def note(name):
        def hook(module, args, kwargs):
            v = turns[name](args[0])
            low, high = seen.get(name, (math.inf, -math.inf))
            seen[name] = min(low, float(v.min())), max(high, float(v.max()))

        return hook

    from ptq4dm.calibration.record import answers

    with torch.no_grad(), hooked(exact, {name: note(name) for name in turns}):
        for batch in store.recorded().batches(16):
            answers(exact, batch)
    other = 0
    for name, (low, high) in seen.items():
        choices = plans.layers[name]
        ends = [choices.input_scale * (code - choices.input_zero_point) for code in (-128, 127)]
        assert ends[0] <= low + choices.input_scale and high - choices.input_scale <= ends[1]
        assert ends[1] - ends[0] <= 1.1 * (max(high, 0) - min(low, 0)) + 1e-6
        other += choices.input_scale != ptq4dm.quantization_config(plain).plan.layers[name].input_scale
    assert other > 10


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda **t: ptq4dm.PTQ4DMConfig(objective="output", **t), "the objective 'output' chooses static grids"),
        (lambda **t: ptq4dm.PDQuantConfig(**t), "chooses static grids by inputs that are not"),
        (lambda **t: ptq4dm.GradPTQConfig(activations="dynamic", **t), "do not go with blocks that are trained"),
        (lambda **t: ptq4dm.RTNConfig(split_inputs=True, **t), "do not go with split_inputs=True"),
        (lambda **t: ptq4dm.RTNConfig(weight_bits=4, average_bits=5.0, **t), "do not go with rows of two widths"),
        (lambda **t: ptq4dm.RTNConfig(weight_grid="power", **t), "do not go with weight_grid='power'"),
        (
            lambda **t: ptq4dm.RTNConfig(
                weight_bits=4, weight_grid="progressive", activations="dynamic", rotate_inputs=True, **t
            ),
            "rotate_inputs=True, which rotates too",
        ),
    ],
)
def test_options_that_know_nothing_of_it_are_refused(make, words):
    with pytest.raises(UserError, match=words) as error:
        make(transforms=("hadamard:16",))
    assert str(error.value).count(". ") == 0


def test_formats_without_rotated_inputs_are_refused(unet, store):
    with pytest.raises(UserError, match="is of format 'bcq', which has no rotated inputs"):
        ptq4dm.quantize(unet(), ptq4dm.LUTGEMMConfig(transforms=("hadamard:16",)), store)


def test_a_model_without_such_channels_is_refused():
    with pytest.raises(UserError, match="'hadamard' rotates inputs whose channels divide into groups of 256, and"):
        ptq4dm.quantize(
            nn.Sequential(nn.Linear(48, 8)), ptq4dm.RTNConfig(transforms=("hadamard:256",), activations="dynamic")
        )


def test_plans_of_another_model_are_refused(unet):
    for name in ("hadamard", "sylvester"):
        plans = TRANSFORMS[name].find(unet(), None, group=16)
        with pytest.raises(UserError, match=f"the plan of '{name}' is of another model: there is no layer"):
            TRANSFORMS[name].check(nn.Linear(16, 16), *plans)


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"hadamard_group": 48}, "a sylvester rotation has groups of .*, not 48"),
        ({"hadamard_kind": "random"}, "a rotation is regular or sylvester, not 'random'"),
        ({"hadamard_kind": "regular"}, "a regular rotation has groups of 16, 64 or 256, not 32"),
        ({"hadamard_group": "32"}, "hadamard_group"),
    ],
)
def test_wrong_plans_are_refused(choices, words):
    plan = rotated_plan(LayerPlan(), 32, "sylvester")
    data = {**vars(plan), **choices}
    with pytest.raises(UserError, match=words):
        check_choices("layer", choices_of("layer", data))
    with pytest.raises(UserError, match="100 inputs do not divide into groups of 32"):
        check_fit("layer", plan, nn.Linear(100, 8))


@pytest.mark.parametrize("make", [ptq4dm.RTNConfig, lambda **more: ptq4dm.SVDQuantConfig(evidence="none", **more)])
def test_layers_are_rotated_while_a_model_loads(make, tmp_path):
    """Nothing of the float model changes, so each layer can be packed as its weight arrives."""
    options = {"transforms": ("hadamard:16",)}
    options |= {} if make is not ptq4dm.RTNConfig else {"activations": "dynamic", "weight_bits": 4}
    model = dit()
    model.save_pretrained(tmp_path / "float")
    ptq4dm.quantize(model, make(**options))
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=make(**options))
    assert same(loaded, model) and torch.equal(run(loaded), run(model))
    assert any("hadamard 16" in str(layer.plan) for layer in loaded.modules() if is_quantized(layer))


def test_changed_models_and_static_grids_are_not_loaded_so(tmp_path):
    model = dit()
    model.save_pretrained(tmp_path / "float")
    for transforms in (("rotate",), ("hadamard:16", "rotate")):
        with pytest.raises(UserError, match="load it in full precision"):
            config = ptq4dm.RTNConfig(activations="dynamic", transforms=transforms)
            type(model).from_pretrained(tmp_path / "float", quantization_config=config)
