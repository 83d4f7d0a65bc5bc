"""Layers with progressive weights: codes by the formula, what they compute, bytes, rounders, files, refusals."""

import copy

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import correlated, same
from ptq4dm import GradPTQConfig, PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.errors import DamagedFile
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.formats.progressive import leaves_int8
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.w8a8 import reference
from ptq4dm.layers import progressive_ops
from ptq4dm.layers.choices import check_choices
from ptq4dm.layers.plan import Int4Plan, Plan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import empty_quantized, quantized_copy
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.layers.stored import check_stored
from ptq4dm.quantization.planning import check_plan
from ptq4dm.rounding.learned import Learning

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [None, 32, 64, 128]


def linear(outputs=24, inputs=256, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs) * torch.rand(1, inputs))
        layer.weight[:, 3] += 1.0  # a range that is not symmetric
    return layer


def conv(outputs=12, channels=128, kernel=3, **options):
    torch.manual_seed(1)
    layer = nn.Conv2d(channels, outputs, kernel, **{"padding": kernel // 2, **options})
    with torch.no_grad():
        layer.weight.mul_(torch.rand(1, 1, *layer.weight.shape[2:]))  # pixels differ, so groups do
    return layer


def by_formula(weight, size):
    """(w8 that codes stand for, s0) of rows [N, K], in float64 and whole numbers, from the paper's formula."""
    s0 = (weight.abs().amax(1, keepdim=True) / 119).bfloat16().double()
    groups = (weight.double() / s0).view(len(weight), -1, size or weight.shape[1])
    w8 = groups.round()
    low, high = w8.amin(-1, keepdim=True).clamp(max=0), w8.amax(-1, keepdim=True).clamp(min=0)
    s1 = ((high - low) / 15).round().clamp(min=1)
    z = (-low / s1).round()
    q = ((groups / s1).round() + z).clamp(0, 15)
    return ((q - z) * s1).flatten(1), s0


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_what_the_formula_says(size):
    layer = linear()
    found = quantized_copy(layer, ProgressivePlan(group_size=size), "layer")
    whole, s0 = by_formula(layer.weight.detach(), size)
    off = (found.dequantized_weight().double() / s0 - whole).abs() > 0.1
    assert off.float().mean() < 1e-3  # a weight between two codes, in float32 and float64
    assert found.wsteps.shape == found.wzeros.shape == (24, 256 // (size or 256))


def test_groups_of_a_convolution_hold_channels_of_one_pixel():
    layer = conv()
    found = quantized_copy(layer, ProgressivePlan(), "layer").dequantized_weight()
    rows = layer.weight.detach().permute(0, 2, 3, 1).reshape(12, 9 * 128)
    whole, s0 = by_formula(rows, 128)
    expected = (whole * s0).view(12, 3, 3, 128).permute(0, 3, 1, 2)
    assert ((found - expected).abs() > 0.1 * s0.view(-1, 1, 1, 1)).float().mean() < 1e-3


def test_nearly_as_good_as_scales_without_a_whole_number():
    """The paper's point: accuracy of groups. Steps in whole numbers cost little, and the bytes are no more."""
    for layer in (linear(48), conv(48)):
        error, size = {}, {}
        for plan in (Int4Plan(group_size=128, affine=True), ProgressivePlan(), Int4Plan(affine=True)):
            found = quantized_copy(layer, plan, "layer")
            error[str(plan)] = float((found.dequantized_weight() - layer.weight.detach()).square().sum())
            size[str(plan)] = stored_bytes(found)
        direct, progressive, row = error.values()
        assert progressive < 1.1 * direct < 0.9 * row
        direct, progressive, _ = size.values()
        assert progressive <= direct


def test_bytes():
    """Half a byte a code; 16 bits for each output, a step and a zero point for each group; `like`."""
    layer = quantized_copy(linear(bias=False), ProgressivePlan(), "layer")
    assert stored_bytes(layer) == 24 * 128 + 24 * 2 + 2 * 24 * 2 + 4
    odd = quantized_copy(nn.Linear(37, 5, bias=False), ProgressivePlan(group_size=None), "layer")  # filled up to 64
    assert stored_bytes(odd) == 5 * 32 + 5 * 2 + 2 * 5 + 4


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["linear", "row", "conv", "grouped-conv", "strided-conv", "narrow-input"])
def test_layers_compute_what_their_codes_stand_for(kind, static):
    layer, x, size, bits = {
        "linear": (linear(), torch.randn(3, 5, 256), 64, 8),
        "row": (linear(5, 37), torch.randn(7, 37), None, 8),
        "conv": (conv(), torch.randn(2, 128, 6, 5), 128, 8),
        "grouped-conv": (conv(channels=256, groups=2), torch.randn(2, 256, 6, 5), 128, 8),
        "strided-conv": (conv(stride=2, bias=False), torch.randn(2, 128, 7, 7), 32, 8),
        "narrow-input": (linear(), torch.randn(4, 256), 128, 5),
    }[kind]
    grid = {"input_scale": 0.03 if bits == 8 else 0.2, "input_zero_point": 5} if static else {}
    quantized = quantized_copy(layer, ProgressivePlan(group_size=size, activation_bits=bits, **grid), "layer")
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        exact.weight.copy_(quantized.dequantized_weight())
        dims = (-1,) if isinstance(layer, nn.Linear) else (1, 2, 3)
        codes, scale = reference.centred_codes(
            x, torch.int8, quantized.input_scale, quantized.input_zero_point, bits, dims
        )
        expected, found = exact(codes * scale), quantized(x)
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize(("vnni", "name"), [(True, "onednn-int8 on an int8 copy"), (False, "reference")])
@pytest.mark.parametrize("compiled", [True, False])
def test_on_a_cpu_4_bit_codes_are_multiplied_or_an_int8_copy_and_that_is_said(vnni, name, compiled, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(library, "available", lambda: compiled)
    settings.forget()
    try:
        right = "cpu-w4a8" if compiled else name
        assert quantized_copy(linear(), ProgressivePlan(), "layer").kernel_name() == right
        assert quantized_copy(conv(), ProgressivePlan(), "layer").kernel_name() == right
        large = "cpu-w4a8" if compiled and not vnni else name  # slower than oneDNN's copy where there is one
        assert quantized_copy(conv(channels=256), ProgressivePlan(), "layer").kernel_name() == large
        assert quantized_copy(conv(channels=256, groups=2), ProgressivePlan(), "layer").kernel_name() == name
    finally:
        settings.forget()


def test_kernels_on_a_gpu_that_is_not_here():
    def name(linear=True, static=False, bits=8, groups=1):
        return progressive_ops.kernel_name(torch.device("cuda"), linear, 256, 2, static, bits, groups)

    with settings.target(settings.Target((9, 0), 132, lambda *_: None)):
        assert name() == "triton-w4a8-progressive"
        for other in ({"linear": False}, {"static": True}, {"bits": 6}):
            assert name(**other) == "unpack + triton-int8"
        assert name(linear=False, groups=2) == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["linear", "row", "conv", "grouped-conv", "rotated"])
def test_kernels_on_a_gpu_give_what_the_reference_gives(kind, static):
    """Nothing is rounded but inputs, which is the same there: sums of codes are whole numbers."""
    layer, x, options = {
        "linear": (linear(72), torch.randn(3, 50, 256), {"group_size": 64}),
        "row": (linear(17, 96), torch.randn(70, 96), {"group_size": None}),
        "conv": (conv(24), torch.randn(2, 128, 9, 8), {}),
        "grouped-conv": (conv(24, 256, groups=2), torch.randn(2, 256, 6, 5), {}),
        "rotated": (linear(72), torch.randn(3, 50, 256), {"rotation": 128}),
    }[kind]
    if static:
        options |= {"input_scale": 0.03, "input_zero_point": 5, "rotation": 0}
    quantized = quantized_copy(layer, ProgressivePlan(**options), "layer")
    with torch.no_grad():
        expected = quantized(x)
        on_gpu = copy.deepcopy(quantized).cuda()
        found = on_gpu(x.cuda())
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found.cpu() - expected).norm() < 2e-3 * expected.norm()
    assert (on_gpu.kernel_name() == "reference") == (kind == "grouped-conv")


def test_new_codes_get_a_new_copy():
    """The copy that a CPU keeps goes with any of its three tensors."""
    quantized, x = quantized_copy(linear(), ProgressivePlan(), "layer"), torch.randn(3, 256)
    with torch.no_grad():
        before = quantized(x)
        quantized.wsteps.clamp_(max=2)
        found = quantized(x)
        expected = quantized_copy(linear(), ProgressivePlan(), "layer")
        expected.put(wsteps=quantized.wsteps.clone())
        assert torch.equal(found, expected(x)) and not torch.equal(found, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits_keep_their_grid(dtype):
    for layer, x in ((linear(), torch.randn(2, 256)), (conv(), torch.randn(1, 128, 4, 4))):
        whole = quantized_copy(layer, ProgressivePlan(), "layer")
        half = copy.deepcopy(whole).to(dtype)
        assert half(x.to(dtype)).dtype == dtype and half.bias.dtype == dtype
        assert half.wscales.dtype == torch.bfloat16 and half.wsteps.dtype == half.wzeros.dtype == torch.int8
        assert torch.equal(half.dequantized_weight(), whole.dequantized_weight())


def test_it_says_what_it_is():
    assert str(ProgressivePlan()) == "W4A8 g128 progressive dynamic"
    assert str(ProgressivePlan(group_size=None, input_scale=1.0, input_zero_point=0)) == "W4A8 progressive static"
    assert str(ProgressivePlan(activation_bits=6)).endswith("(simulated)")


def test_the_ops_are_whole_and_compile():
    fully, window = (quantized_copy(layer, ProgressivePlan(), "layer") for layer in (linear(), conv(stride=2)))
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.ptq4dm.stepped_linear.default, (torch.randn(3, 256), *fully.operands))
    torch.library.opcheck(
        torch.ops.ptq4dm.stepped_conv2d.default, (torch.randn(2, 128, 7, 6), *window.operands, *geometry)
    )
    for layer, x in ((fully, torch.randn(2, 256)), (window, torch.randn(1, 128, 6, 6))):
        with torch.no_grad():
            assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


# ------------------------------------------------------------------------------------------------ rounders, ranges


def output_error(layer, rows, **options):
    found = quantized_copy(layer, ProgressivePlan(**options), "layer", LayerEvidence(rows))
    assert not leaves_int8(found.wsteps, found.wzeros).any()
    wrong = (found.dequantized_weight() - layer.weight.detach()).flatten(1)
    return float((rows @ wrong.T).square().sum())


def test_rounders_and_objectives_serve_it():
    rows, layer = correlated(400, 256), linear()
    nearest = output_error(layer, rows)
    gptq = output_error(layer, rows, rounding="gptq")
    assert gptq < 0.6 * nearest and output_error(layer, rows, rounding="learned") <= gptq
    assert output_error(layer, rows, objective="output") < 0.97 * nearest
    assert output_error(layer, rows, rounding="gptq", objective="output") < 0.6 * nearest


def test_searched_steps_have_the_least_error_of_the_weight():
    layer = linear()
    plans = {objective: ProgressivePlan(objective=objective) for objective in ("max", "mse", "lp")}
    found = {name: quantized_copy(layer, plan, "layer") for name, plan in plans.items()}
    errors = {
        name: (one.dequantized_weight() - layer.weight.detach()).square().view(-1, 128).sum(1)
        for name, one in found.items()
    }
    assert (errors["mse"] <= errors["max"] * 1.000001).all() and errors["mse"].sum() < 0.99 * errors["max"].sum()
    assert (found["mse"].wsteps <= found["max"].wsteps).all()
    assert torch.equal(found["mse"].wzeros, found["max"].wzeros)


def test_training_of_scales_is_refused(unet):
    with pytest.raises(UserError, match="leave 'scales' out of train"):
        GradPTQConfig(weight_grid="progressive", train=("rounding", "scales"))
    GradPTQConfig(weight_grid="progressive", train=("rounding", "ranges"))
    layers = {"conv_in": ProgressivePlan(group_size=None, rounding="learned")}
    with pytest.raises(UserError, match="'conv_in' has format 'progressive', whose scales are whole steps"):
        check_plan(unet(), Plan("gradptq", layers, learning=Learning(train=("rounding", "scales"))))
    check_plan(unet(), Plan("gradptq", layers, learning=Learning(train=("rounding",))))


# ------------------------------------------------------------------------------------------------ rotation


def spiky(rows, columns):
    """Inputs of which a few are large, in every row the same."""
    x = correlated(rows, columns)
    x[:, ::37] *= 20
    return x


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped-conv", "strided-conv"])
def test_turned_layers_compute_the_same_function(kind):
    """The dequantized weight is that of inputs as they come; codes are of turned ones, which are rounded."""
    layer, x, block = {
        "linear": (linear(), torch.randn(3, 5, 256), 128),
        "conv": (conv(), torch.randn(2, 128, 6, 5), 128),
        "grouped-conv": (conv(channels=256, groups=2), torch.randn(2, 256, 6, 5), 64),
        "strided-conv": (conv(stride=2, bias=False), torch.randn(2, 128, 7, 7), 32),
    }[kind]
    quantized = quantized_copy(layer, ProgressivePlan(rotation=block), "layer")
    weight = quantized.dequantized_weight()
    assert (weight - layer.weight).norm() < 0.12 * layer.weight.norm()
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        exact.weight.copy_(weight)
        expected, found = exact(x), quantized(x)
        assert (found - expected).norm() < 0.02 * expected.norm()  # inputs of 8 bits
        plain = quantized_copy(layer, ProgressivePlan(), "layer")
        assert not torch.equal(plain.qweight, quantized.qweight)
        assert torch.equal(torch.compile(quantized, backend="aot_eager", fullgraph=True)(x), found)
    assert str(quantized.plan) == "W4A8 g128 progressive rotated dynamic"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_inputs_are_turned_by_the_kernel_that_rounds_them(device, monkeypatch):
    """On a GPU, in 16 bits; elsewhere by a product before. Nothing is rounded in between."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(3)
    linear = nn.Linear(192, 48)
    layer = quantized_copy(linear, ProgressivePlan(objective="max", group_size=64, rotation=64), "x")
    x = torch.randn(70, 192).bfloat16()
    exact = torch.nn.functional.linear(x.float(), layer.dequantized_weight(), linear.bias)
    before = layer(x).float()
    assert layer.codes_key() is None and not layer.turns_in_codes()
    layer.to(device)
    if device == "cpu":
        monkeypatch.setattr(type(layer), "turns_in_codes", lambda layer: True)
    else:
        assert layer.codes_key() == ("tokens", 64)
    found = layer(x.to(device)).float().cpu()
    assert 0 < (found - exact).norm() < 1.02 * (before - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(found, before)


def test_turned_or_not_is_what_calibration_says():
    """Inputs with large channels are better turned; rows of a weight that has few inputs of any size are not."""
    layer, rows = linear(), spiky(400, 256)
    found = quantized_copy(layer, ProgressivePlan(rotation=None), "layer", LayerEvidence(rows))
    never = quantized_copy(layer, ProgressivePlan(), "layer")
    with torch.no_grad():
        errors = [float((one(rows) - layer(rows)).square().sum()) for one in (found, never)]
    assert found.plan.rotation == 32 and errors[0] < 0.7 * errors[1]
    sparse = linear(inputs=128)
    with torch.no_grad():
        sparse.weight.zero_()[:, :4] = torch.tensor([7.0, -7.0, 4.0, -8.0])  # four inputs, on the grid
    rows = torch.randint(-127, 128, (400, 128)).float()
    rows[:, 0] = 127  # on the grid too
    found = quantized_copy(sparse, ProgressivePlan(rotation=None), "layer", LayerEvidence(rows))
    assert found.plan.rotation == 0
    with pytest.raises(UserError, match="decided on what layers are fed"):
        quantized_copy(layer, ProgressivePlan(rotation=None), "layer")


def test_hessian_rounding_of_turned_weights_sees_turned_inputs():
    layer, rows = linear(), spiky(400, 256)
    errors = {}
    for rounding in ("nearest", "gptq"):
        plan = ProgressivePlan(rotation=128, rounding=rounding)
        found = quantized_copy(layer, plan, "layer", LayerEvidence(rows)).dequantized_weight()
        errors[rounding] = float((rows @ (found - layer.weight.detach()).T).square().sum())
    assert errors["gptq"] < 0.6 * errors["nearest"]


def test_odd_widths_are_not_turned():
    found = quantized_copy(
        nn.Linear(37, 5), ProgressivePlan(group_size=None, rotation=None), "layer", LayerEvidence(torch.randn(50, 37))
    )
    assert found.plan.rotation == 0


def test_what_rotation_does_not_go_with_is_refused(unet):
    with pytest.raises(UserError, match="rotate_inputs goes with"):
        RTNConfig(weight_bits=4, weight_grid="progressive", rotate_inputs=True)
    with pytest.raises(UserError, match="rotate_inputs goes with"):
        RTNConfig(weight_bits=4, activations="dynamic", rotate_inputs=True)
    with pytest.raises(UserError, match="leave rotate_inputs out"):
        GradPTQConfig(weight_grid="progressive", activations="dynamic", rotate_inputs=True)
    layers = {"conv_in": ProgressivePlan(group_size=None, rounding="learned", rotation=None)}
    with pytest.raises(UserError, match="'conv_in' has inputs that are turned"):
        check_plan(unet(), Plan("gradptq", layers, learning=Learning()))
    empty, tensors = stored()
    empty.plan = ProgressivePlan(rotation=None)
    with pytest.raises(ValueError, match="no 'rotation'"):
        check_stored(empty, tensors)
    with pytest.raises(ValueError, match="do not divide into groups of 128"):
        ProgressivePlan(group_size=32, rotation=128).check_layer(nn.Linear(96, 4))


# ------------------------------------------------------------------------------------------------ files, recipes


def stored():
    layer = quantized_copy(linear(), ProgressivePlan(), "layer")
    return empty_quantized(linear(), layer.plan, "meta"), dict(layer.state_dict())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"wsteps": torch.full((24, 2), 17, dtype=torch.int8)}, r"'wsteps' holds 17, out of \[1, 16\]"),
        ({"wsteps": torch.zeros(24, 2, dtype=torch.int8)}, r"'wsteps' holds 0, out of \[1, 16\]"),
        ({"wsteps": torch.ones(24, 2)}, "'wsteps' is float32 and should be int8"),
        ({"wsteps": torch.ones(24, 2, dtype=torch.float16)}, "'wsteps' is float16 and should be int8"),
        ({"wzeros": torch.full((24, 2), 8, dtype=torch.int8)}, r"'wzeros' holds 8, out of \[-8, 7\]"),
        ({"wzeros": torch.full((24, 2), -8, dtype=torch.int8)}, "a code would leave int8"),
        ({"wscales": torch.zeros(24, dtype=torch.bfloat16)}, "'wscales' holds 0"),
        ({"wscales": torch.full((24,), float("nan"), dtype=torch.bfloat16)}, "'wscales' holds NaN"),
        ({"qweight": torch.zeros(24, 128, dtype=torch.int8)}, "'qweight' is int8"),
    ],
    ids=str,
)
def test_files_at_odds_with_their_plan_are_refused(changed, words):
    empty, tensors = stored()
    check_stored(empty, tensors)
    with pytest.raises(ValueError, match=words):
        check_stored(empty, tensors | changed)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"weight_bits": 3}, "4 bits, not 3"),
        ({"group_size": 48}, "not 48"),
        ({"activation_bits": 9}, "from 2 to 8"),
        ({"rotation": 48}, "power of two up to 128, not 48"),
        ({"rotation": 256}, "power of two up to 128, not 256"),
        ({"rotation": 64, "input_scale": 1.0, "input_zero_point": 0}, "have no static grid"),
    ],
    ids=str,
)
def test_plans_out_of_range_are_refused(choice, words):
    with pytest.raises(DamagedFile, match=words):
        check_choices("layer", ProgressivePlan(**choice))


@pytest.mark.parametrize("choice", [{}, {"format": "fp8"}, {"weight_bits": 3}, {"weight_bits": 4, "affine": True}])
def test_recipes_that_it_does_not_serve_are_refused(choice):
    with pytest.raises(UserError, match="weight_grid='progressive' goes with"):
        RTNConfig(weight_grid="progressive", **choice)


def test_nan_in_a_weight_names_the_layer():
    layer = linear()
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="'here' holds NaN"):
        quantized_copy(layer, ProgressivePlan(), "here")


@pytest.mark.parametrize("objective", ["max", "mse"])
def test_a_saved_model_comes_back_to_the_bit(tmp_path, unet, objective):
    model = unet()
    config = PTQ4DMConfig(
        weight_bits=4, group_size=32, weight_grid="progressive", activations="dynamic", objective=objective
    )
    ptq4dm.quantize(model, config)
    assert {str(m.plan) for m in model.modules() if hasattr(m, "plan")} >= {"W4A8 g32 progressive dynamic"}
    assert model.conv_in.plan.format == model.conv_out.plan.format == "int8"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(model, loaded)
    x = torch.randn(1, 3, model.config.sample_size, model.config.sample_size)
    with torch.no_grad():
        assert torch.equal(model(x, 5).sample, loaded(x, 5).sample)
