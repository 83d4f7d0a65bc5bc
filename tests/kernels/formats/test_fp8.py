"""FP8 (e4m3) as a format of the 8-bit methods: rounding, plans, checkpoints, conversion, wrong input."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

import ptq4dm
from helpers import run
from ptq4dm import PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.kernels.formats import fp8
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.w8a8 import Fp8Conv2d, Fp8Linear
from ptq4dm.quantization.planning import make_plan


@pytest.fixture(scope="module")
def store(unet):
    pipe = DDPMPipeline(unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=4, num_inference_steps=3))


def e4m3(values):
    """Rounded to nearest even among the values that a sign, 4 bits of exponent and 3 of mantissa can write."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]  # the last one is NaN
    table = torch.tensor(positive, dtype=torch.float64)
    magnitude = values.double().abs().clamp(max=table[-1])
    above = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - magnitude, magnitude - table[below]
    take = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return table[take].copysign(values.double())


def test_codes_are_the_format():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 100
    x = torch.cat([x, x * 1e-4, torch.tensor([0.0, 448, 464, 1e9, -1e9, float("inf"), 2.0**-10, 3 * 2.0**-10])])
    codes = fp8.quantize(x, torch.tensor(1.0))
    assert codes.dtype == torch.float8_e4m3fn and torch.equal(codes.double(), e4m3(x))
    assert fp8.quantize(torch.tensor([float("nan")]), torch.tensor(1.0)).float().isnan().all()


@pytest.mark.parametrize("static", [True, False])
def test_layers_are_the_formula(static):
    generator = torch.Generator().manual_seed(0)
    x, conv = torch.randn(2, 6, 7, 5, generator=generator), nn.Conv2d(6, 4, 3, padding=1, stride=2)
    model = nn.Sequential(conv)
    weight, bias = conv.weight.detach(), conv.bias.detach().double()
    plan = LayerPlan("fp8", input_scale=0.004 if static else None)
    ptq4dm.quantize(model, RTNConfig(format="fp8", plan=ptq4dm.Plan("rtn", {"0": plan})))
    layer = model[0]
    assert type(layer) is Fp8Conv2d and layer.kernel_name() == w8a8.REFERENCE
    weight_scale = weight.abs().amax((1, 2, 3), keepdim=True) / 448
    q_w = e4m3(weight * (1 / weight_scale)) * weight_scale.double()
    scale = torch.tensor(0.004) if static else x.abs().amax((1, 2, 3), keepdim=True) / 448
    q_x = e4m3(x * (1 / scale)) * scale.double()
    expected = torch.nn.functional.conv2d(q_x, q_w, bias, 2, 1)
    assert (layer(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.allclose(layer.dequantized_weight().double(), q_w, rtol=1e-6)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_checkpoints_keep_codes_and_answers(activations, store, unet, tmp_path):
    model, exact = unet(), run(unet())
    report = ptq4dm.quantize(model, PTQ4DMConfig(format="fp8", activations=activations), store)
    assert {row["format"] for row in report.layers} == {f"FP8 {activations}"}
    before = run(model)
    assert 0 < (before - exact).norm() <= 0.2 * exact.norm()
    assert all(type(m) in (Fp8Conv2d, Fp8Linear) for m in model.modules() if is_quantized(m))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(UNet2DModel.from_pretrained(tmp_path)), before)
    half = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        if name.endswith(("qweight", "scale")):
            same = model.state_dict()[name]
            assert tensor.dtype == same.dtype and torch.equal(tensor.float(), same.float()), name
    assert half.conv_in.bias.dtype == torch.bfloat16 and (run(half) - before).norm() <= 0.1 * before.norm()


def test_conversion_leaves_codes_alone(unet):
    model = unet()
    ptq4dm.quantize(model, RTNConfig(format="fp8", activations="dynamic"))
    codes = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(("qweight", "scale"))}
    layer = model.conv_in
    for module in (layer.to(torch.bfloat16), layer.half(), layer.double(), layer.float()):
        for name in ("qweight", "weight_scale"):
            tensor, right = getattr(module, name), codes[f"conv_in.{name}"]
            assert tensor.dtype == right.dtype and torch.equal(tensor.float(), right.float())


def test_ranges_reach_to_the_largest_value(store, unet):
    """Whatever the objective: the plan of PTQ4DM, whose own would clip, is that of RTN."""
    plans = [make_plan(unet(), kind(format="fp8"), store).layers for kind in (PTQ4DMConfig, RTNConfig)]
    assert plans[0] == plans[1]
    for name, layer in plans[0].items():
        _, _, low, high = store.input_of(name)
        assert layer.input_scale == pytest.approx(max(-low, high) / 448) and layer.input_zero_point is None


def test_wrong_formats_are_refused():
    with pytest.raises(UserError, match="format must be one of int8, fp8; got 'int4'"):
        RTNConfig(format="int4")
    for bits in ({"weight_bits": 4}, {"activation_bits": 6}):
        with pytest.raises(UserError, match="format='fp8' has 8 bits"):
            PTQ4DMConfig(format="fp8", **bits)
