"""Each form of layer alone: its codes in OpenVINO's model, and what comes out, are those of the layer."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers import needs_vnni
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import quantized_copy

openvino = pytest.importorskip("openvino")

from ptq4dm.inference.openvino import processor  # noqa: E402
from ptq4dm.inference.openvino.engine import ThroughOpenVINO  # noqa: E402
from ptq4dm.inference.openvino.forms import form_of  # noqa: E402
from ptq4dm.kernels.w8a8 import reference  # noqa: E402
from ptq4dm.layers import int4_ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STATIC = dict(input_scale=0.03, input_zero_point=-90)
FLOAT = dict(activation_bits=16)
LINEAR = {
    "int8 static": LayerPlan(**STATIC),
    "int8 dynamic": LayerPlan(),
    "int4 rows": Int4Plan(**STATIC),
    "int4 rows affine": Int4Plan(affine=True),
    "progressive": ProgressivePlan(group_size=32),
    "progressive turned": ProgressivePlan(group_size=64, rotation=16),
}
GROUPED = {
    "int4 groups": Int4Plan(group_size=32),
    "int4 groups affine static": Int4Plan(group_size=64, affine=True, **STATIC),
    "weights alone": Int4Plan(group_size=64, **FLOAT),
    "weights alone, rows": Int4Plan(**FLOAT),
}
CONV = {
    "int8 static": LayerPlan(**STATIC),
    "int8 dynamic": LayerPlan(),
    "int4 rows": Int4Plan(**STATIC),
    "progressive": ProgressivePlan(group_size=32),
    "progressive turned": ProgressivePlan(group_size=64, rotation=16),
}


@pytest.fixture
def sums_fit(monkeypatch):
    """The processor adds products of bytes in 32 bits, or is believed to: these inputs leave no large sums."""
    monkeypatch.setattr(processor, "sums_fit", lambda: True)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


@torch.no_grad()
def through(layer, x, precision="float32"):
    net = Net(layer).eval()
    engine = ThroughOpenVINO(net, precision)
    return engine(x), engine


def linear(plan):
    torch.manual_seed(0)
    return quantized_copy(nn.Linear(128, 48), plan, "layer"), torch.randn(3, 5, 128)


def conv(plan, **options):
    torch.manual_seed(0)
    layer = quantized_copy(nn.Conv2d(64, 32, 3, padding=1, **options), plan, "layer")
    return layer, torch.randn(2, 64, 6, 6)


@torch.no_grad()
def truth(layer, x):
    """The formula in float64 on the layer's dequantized weight."""
    plan = layer.plan
    dims = (1, 2, 3) if x.ndim == 4 else (-1,)
    if getattr(plan, "rotation", 0):
        return layer(x)
    inputs = int4_ops.rounded(x, layer.input_scale, layer.input_zero_point, plan.activation_bits, dims)
    float_layer = layer.dequantized().double()
    return float_layer(inputs.double())


@torch.no_grad()
def close(a, b):
    return float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@needs_vnni
@pytest.mark.parametrize("plan", LINEAR)
def test_linear_layers_in_integers(plan):
    layer, x = linear(LINEAR[plan])
    y, engine = through(layer, x)
    assert close(y, truth(layer, x))
    assert engine.products()["layer"][0] in ("i8", "u8")


@needs_vnni
@pytest.mark.parametrize("plan", CONV)
@pytest.mark.parametrize("stride", (1, 2))
def test_convolutions_in_integers(plan, stride):
    layer, x = conv(CONV[plan], stride=stride)
    y, engine = through(layer, x)
    assert close(y, truth(layer, x))
    assert engine.products()["layer"][0] in ("i8", "u8")


@pytest.mark.parametrize("plan", GROUPED)
def test_layers_in_floats_are_told_by_name(plan):
    layer, x = linear(GROUPED[plan])
    y, engine = through(layer, x)
    assert close(y, truth(layer, x))
    said = "\n".join(engine.lines())
    assert "0 of 1 quantized layers in products of int8" in said
    assert "'layer' runs in floats, as its plan has inputs of floats, or scales of groups" in said
    assert "1 products unpack weights of 4 bits" in said


def test_many_layers_in_floats_are_told_in_one_line():
    layers = [quantized_copy(nn.Linear(64, 64), Int4Plan(group_size=32), "layer") for _ in range(3)]
    _, engine = through(nn.Sequential(*layers), torch.randn(2, 64))
    (said,) = [line for line in engine.lines() if "in floats" in line]
    assert said == (
        "3 layers run in floats, as their plans have inputs of floats, or scales of groups; the first is 'layer.0'"
    )


@needs_vnni
def test_grouped_convolutions():
    layer, x = conv(LayerPlan(**STATIC), groups=4)
    y, _ = through(layer, x)
    assert close(y, truth(layer, x))


@pytest.mark.parametrize("bits", (4, 6))
def test_narrower_grids(bits):
    layer, x = linear(LayerPlan(weight_bits=bits, activation_bits=bits, input_scale=0.3, input_zero_point=1))
    assert close(through(layer, x)[0], truth(layer, x))
    layer, x = linear(LayerPlan(weight_bits=bits, activation_bits=bits))
    assert close(through(layer, x)[0], truth(layer, x))


@needs_vnni
@pytest.mark.parametrize("plan", [*LINEAR.values(), *GROUPED.values()], ids=[*LINEAR, *GROUPED])
def test_nothing_is_rounded_anew(plan):
    """The constants of the converted model are the codes and scales of the layer."""
    layer, x = linear(plan)
    _, engine = through(layer, x)
    (made,) = engine.conversions.values()
    weight = form_of(layer).weight
    constants = [values(node) for node in made.get_ops() if node.get_type_name() == "Constant"]
    wide = weight.codes.numpy()
    assert any(one.size == wide.size and np.array_equal(one.reshape(wide.shape), wide) for one in constants)
    assert any(one.size == weight.scales.numel() and np.array_equal(one.ravel(), weight.scales.numpy().ravel())
               for one in constants)  # fmt: skip
    kinds = {str(node.get_element_type()) for node in made.get_ops() if node.get_output_size()}
    assert ("<Type: 'int4_t'>" in kinds) == (weight.bits == 4)
    assert torch.equal(weight.dequantized(), layer.dequantized_weight()) or plan.format == "progressive"


def values(constant):
    if "int4" not in str(constant.get_element_type()):
        return constant.get_data()
    packed = constant.get_data().view(np.uint8).ravel()
    nibbles = np.stack([packed & 15, packed >> 4], -1).ravel().astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles)


def test_dynamic_scales_of_zeros(sums_fit):
    layer, x = linear(LayerPlan())
    y, _ = through(layer, torch.zeros_like(x))
    assert close(y, layer.bias.expand_as(y))


def test_bfloat16_around(sums_fit):
    layer, x = linear(LayerPlan(**STATIC))
    y, engine = through(layer, x, "bfloat16")
    assert float((y - truth(layer, x)).square().sum() / y.square().sum()) < 1e-4
    assert engine.products()["layer"][0] in ("i8", "u8")


def test_reference_is_the_same_formula():
    """What `truth` above computes is what the kernels' reference does."""
    layer, x = linear(LayerPlan(**STATIC))
    y = reference.linear(x.flatten(0, 1), *layer.operands).view(3, 5, -1)
    assert close(y, truth(layer, x))
