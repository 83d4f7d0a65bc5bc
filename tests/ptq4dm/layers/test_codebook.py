"""Layers with a codebook: what they compute, their bytes, files, rounding by what they are fed, refusals."""

import copy

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import correlated, same
from ptq4dm import PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.evidence import LayerEvidence
from ptq4dm.kernels.runtime import settings
from ptq4dm.layers import int4_ops
from ptq4dm.layers.choices import check_choices
from ptq4dm.layers.codebook import CodebookPlan
from ptq4dm.layers.plan import Int4Plan, Plan
from ptq4dm.layers.registry import empty_quantized, needs_of, quantized_copy
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.layers.stored import check_stored
from ptq4dm.quantization.packing import pack_plan

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(outputs=12, inputs=128, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=0.05)
    return layer


def conv(**options):
    torch.manual_seed(1)
    return nn.Conv2d(64, 8, 3, padding=1, **options)


CASES = {
    "linear": (linear, (3, 5, 128)),
    "conv": (conv, (2, 64, 6, 5)),
    "grouped": (lambda: conv(groups=2, bias=False), (2, 64, 6, 5)),
    "strided": (lambda: conv(stride=2), (2, 64, 7, 7)),
}


@pytest.mark.parametrize("levels", ["tensor", "row"])
@pytest.mark.parametrize(("size", "inputs"), [(None, "dynamic"), (32, "dynamic"), (32, "static"), (32, "floats")])
@pytest.mark.parametrize("kind", CASES)
def test_layers_compute_what_their_codes_stand_for(kind, size, inputs, levels):
    make, shape = CASES[kind]
    layer, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    grid = {"input_scale": 4 / 128, "input_zero_point": 5} if inputs == "static" else {}
    bits = 16 if inputs == "floats" else 8
    quantized = quantized_copy(layer, CodebookPlan(group_size=size, levels=levels, activation_bits=bits, **grid), "l")
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        exact.weight.copy_(quantized.dequantized_weight())
        rounded = x
        if inputs == "static":
            rounded = ((x / (4 / 128)).round().add(5).clamp(-128, 127) - 5) * (4 / 128)
        elif inputs == "dynamic":
            scale = x.abs().amax((-1,) if kind == "linear" else (1, 2, 3), keepdim=True) / 127
            rounded = (x / scale).round() * scale
        expected, found = exact(rounded), quantized(x)
    assert found.dtype == x.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    values = quantized.dequantized_weight().flatten(1) if size is None else None
    assert values is None or all(len(row.unique()) <= 16 for row in values)


@pytest.mark.parametrize("size", [None, 64])
def test_bytes_are_those_of_int4_and_the_levels(size):
    layer = linear(bias=False)
    uniform = stored_bytes(quantized_copy(layer, Int4Plan(group_size=size), "l"))
    for levels, rows in (("tensor", 1), ("row", 12)):
        found = quantized_copy(layer, CodebookPlan(group_size=size, levels=levels), "l")
        assert stored_bytes(found) == uniform + 16 * rows


def test_errors_of_weights_are_below_those_of_int4():
    for layer in (linear(24, 256), conv()):
        nn.init.normal_(layer.weight)
        off = []
        for plan in (Int4Plan(group_size=64, objective="mse"), CodebookPlan(group_size=64)):
            found = quantized_copy(layer, plan, "layer").dequantized_weight()
            off.append(float((found - layer.weight.detach()).square().sum()))
        assert off[1] < 0.8 * off[0]


def test_hessian_rounding_lowers_the_error_of_the_output():
    layer, rows = linear(24, 128), correlated(512, 128)
    off = {}
    for rounding in ("nearest", "gptq"):
        plan = CodebookPlan(group_size=64, rounding=rounding)
        evidence = LayerEvidence(rows) if needs_of(plan) else None
        assert (rounding == "gptq") == (evidence is not None)
        wrong = quantized_copy(layer, plan, "layer", evidence).dequantized_weight() - layer.weight.detach()
        off[rounding] = float((rows @ wrong.T).square().sum())
    assert off["gptq"] < 0.6 * off["nearest"]


def test_objectives_that_look_at_inputs_weigh_the_error():
    plan = CodebookPlan(objective="output")
    assert needs_of(plan) == {"rows"} and not needs_of(CodebookPlan(objective="mse"))
    layer, rows = linear(24, 128), torch.randn(512, 128) * torch.logspace(-1, 1, 128)
    fits = [quantized_copy(layer, plan, "l", LayerEvidence(rows)), quantized_copy(layer, CodebookPlan(), "l")]
    errors = [float((rows @ (one.dequantized_weight() - layer.weight.detach()).T).square().sum()) for one in fits]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits_keep_their_grid(dtype):
    whole = quantized_copy(linear(), CodebookPlan(group_size=64), "layer")
    half = copy.deepcopy(whole).to(dtype)
    assert half(torch.randn(2, 128, dtype=dtype)).dtype == dtype
    assert half.levels.dtype == torch.int8 and half.wscales.dtype == torch.float16
    assert torch.equal(half.dequantized_weight(), whole.dequantized_weight())


def test_it_says_what_it_is():
    plan = CodebookPlan(group_size=64, levels="row")
    assert str(plan) == "W4A8 g64 codebook by row dynamic" and not plan.simulated
    assert str(CodebookPlan(activation_bits=16)) == "W4A16 codebook"
    assert CodebookPlan(activation_bits=6).simulated


@pytest.mark.parametrize(("change", "words"), [
    ({"weight_bits": 3}, "4 bits, not 3"),
    ({"levels": "group"}, "of the tensor or of each row"),
    ({"group_size": 48}, "group_size is none, 32, 64 or 128"),
])  # fmt: skip
def test_plans_out_of_range_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        check_choices("layer", CodebookPlan(**change))


def test_damaged_files_are_refused():
    layer = quantized_copy(linear(), CodebookPlan(), "layer")
    tensors = dict(layer.named_parameters())
    empty = empty_quantized(linear(), layer.plan, "cpu")
    check_stored(empty, tensors)
    lower = tensors["levels"].detach().clone()
    lower[0, 0] = -128
    for levels, words in ((tensors["levels"].flip(1), "do not rise"), (lower, "out of")):
        with pytest.raises(ValueError, match=words):
            check_stored(empty, {**tensors, "levels": levels})


def test_a_saved_model_comes_back_to_the_bit(tmp_path, unet):
    model = unet()
    config = RTNConfig(weight_bits=4, weight_grid="codebook", codebook_of="row", activations="dynamic")
    ptq4dm.quantize(model, config)
    plans = [module.plan for module in model.modules() if hasattr(module, "plan")]
    assert any(isinstance(plan, CodebookPlan) and plan.levels == "row" for plan in plans)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(model, loaded)
    x = torch.randn(1, 3, model.config.sample_size, model.config.sample_size)
    with torch.no_grad():
        assert torch.equal(model(x, 5).sample, loaded(x, 5).sample)


def test_weights_alone_are_quantized_saved_and_loaded(tmp_path, unet):
    """Inputs stay floats: a plan, its bytes and its answers; without a GPU no kernel serves it, and it says so."""
    model, size = unet(), 32
    config = RTNConfig(
        weight_bits=4, weight_grid="codebook", codebook_of="row", group_size=size, activation_bits=16,
        activations="dynamic",
    )  # fmt: skip
    report = ptq4dm.quantize(model, config)
    rows = [row for row in report.layers if row["format"].startswith("W4A16")]
    assert len(rows) > 10 and {row["format"] for row in rows} <= {
        "W4A16 codebook by row", "W4A16 g32 codebook by row"
    }  # fmt: skip
    assert torch.cuda.is_available() or {row["kernel"] for row in rows} == {"reference"}
    exact = unet()
    for row in rows:
        layer = model.get_submodule(row["layer"])
        exact.get_submodule(row["layer"]).weight.data = layer.dequantized_weight()
        x = torch.randn(2, *([layer.in_channels, 5, 5] if hasattr(layer, "kernel_size") else [layer.in_features]))
        with torch.no_grad():
            assert torch.allclose(layer(x), exact.get_submodule(row["layer"])(x), atol=1e-4), row["layer"]
    model.save_pretrained(tmp_path)
    assert same(model, type(model).from_pretrained(tmp_path)) and ptq4dm.verify(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_of_float_inputs_says_which_kernels_a_gpu_has(dtype, monkeypatch):
    found = int4_ops.kernel_name
    monkeypatch.setattr(int4_ops, "kernel_name", lambda _, *more: found(torch.device("cuda"), *more))
    many, few = {"all rows": "unpack + cublas"}, {"rows <= 32": "triton-w4a16", "more": "unpack + cublas"}
    with settings.target(settings.Target((9, 0), 132, lambda *_: None)):
        for size in (None, 32, 64, 128):
            made = quantized_copy(
                linear(12, 256).to(dtype), CodebookPlan(activation_bits=16, group_size=size), "layer"
            )
            assert made.kernels() == (few if dtype == torch.bfloat16 and size in (64, 128) else many)
        made = quantized_copy(conv().to(dtype), CodebookPlan(activation_bits=16, group_size=64), "layer")
        assert made.kernel_name() == "unpack + cudnn"


def test_a_plan_gives_the_same_codes(unet):
    plan = Plan("rtn", {"time_embedding.linear_1": CodebookPlan(), "mid_block.resnets.0.conv1": CodebookPlan()})
    first, second = unet(), unet()
    pack_plan(first, plan)
    pack_plan(second, Plan.from_dict(plan.to_dict()))
    assert same(first, second)


@pytest.mark.parametrize(("options", "words"), [
    ({"weight_bits": 8}, "weight_bits=4"),
    ({"affine": True}, "affine=False"),
    ({"format": "fp8", "weight_bits": 8}, "format='int8'"),
    ({"split_inputs": True}, "split_inputs=False"),
    ({"weight_grid": "uniform", "codebook_of": "row"}, "give weight_grid='codebook'"),
    ({"activation_bits": 16}, "at most 4 bits, of a uniform grid or of a codebook: give activations='dynamic' with"),
    ({"activation_bits": 16, "weight_grid": "progressive"}, "give weight_grid='uniform' and activations='dynamic'"),
])  # fmt: skip
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(UserError, match=words):
        RTNConfig(**{"weight_grid": "codebook", "weight_bits": 4} | options)


def test_a_rounding_that_is_trained_does_not_serve_it():
    with pytest.raises(UserError, match="goes with other options; give rounding='gptq' with it"):
        PTQ4DMConfig(weight_grid="codebook", weight_bits=4, rounding="learned")
