"""Processors whose sums of products of bytes overflow: who they are, what is refused there, and what is not."""

import platform
import re

import pytest
import torch

import models
import ptq4dm
from ptq4dm.inference.openvino import processor
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.registry import quantized_copy

pytest.importorskip("openvino")

from ptq4dm.inference.openvino.engine import ThroughOpenVINO  # noqa: E402
from ptq4dm.inference.openvino.forms import form_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def overflowing(monkeypatch):
    monkeypatch.setattr(processor, "sums_fit", lambda: False)


@pytest.mark.parametrize(
    ("machine", "has", "fit"),
    [
        ("x86_64", set(), False),
        ("AMD64", {"avx2", "avx512_f"}, False),
        ("x86_64", {"avx512_vnni"}, True),
        ("x86_64", {"avx_vnni"}, True),
        ("x86_64", {"amx_int8"}, True),
        ("aarch64", set(), True),
    ],
)
def test_which_processors(machine, has, fit, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: "avx512_vnni" in has)
    assert processor.sums_fit() == fit


def test_a_model_in_8_bits_is_refused_before_it_is_converted(overflowing):
    model = models.plain_unet()
    ptq4dm.quantize(model, ptq4dm.RTNConfig(activations="dynamic"))
    first = next(name for name, layer in model.named_modules() if hasattr(layer, "plan"))
    with pytest.raises(ptq4dm.UserError, match="none of AVX512-VNNI, AVX-VNNI and AMX") as refused:
        ptq4dm.optimize(model, engine="openvino")
    assert re.search(f"overflow .those of '{first}', and [0-9]+ more.; leave the engine out", str(refused.value))
    assert "forward" not in vars(model)


def one_layer(plan):
    """A layer of large weights: with inputs at the upper end of their grid, sums are as large as can be."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 32)
    layer.weight.data.uniform_(0.98, 1)
    return torch.nn.Sequential(quantized_copy(layer, plan, "layer")).eval()


STATIC = dict(input_scale=1 / 255, input_zero_point=-128)
SERVED = {
    "7 bits": LayerPlan(weight_bits=7, **STATIC),
    "7 bits, dynamic": LayerPlan(weight_bits=7),
    "groups": Int4Plan(group_size=32, **STATIC),
}


@pytest.mark.parametrize("name", SERVED)
def test_narrower_weights_and_products_of_floats_are_served_and_right(name, overflowing):
    model, x = one_layer(SERVED[name]), torch.rand(4, 128) * 0.1 + 0.9
    with torch.no_grad():
        expected = model(x)
        found = ThroughOpenVINO(model, "float32")(x)
    assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("plan", [LayerPlan(**STATIC), LayerPlan(), ProgressivePlan(group_size=32)], ids=str)
def test_codes_of_8_bits_are_refused(plan, overflowing):
    model = one_layer(plan)
    assert form_of(model[0]).weight.largest() > 64
    with pytest.raises(ptq4dm.UserError, match="overflow \\(those of '0'\\); leave"):
        ThroughOpenVINO(model, "float32")


def test_this_processor_overflows_where_it_is_said_to():
    model, x = one_layer(LayerPlan(**STATIC)), torch.ones(4, 128)
    layer = model[0]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        fit = processor.sums_fit()
        patch.setattr(processor, "sums_fit", lambda: True)
        try:
            found = ThroughOpenVINO(model, "float32")(x)
        except ptq4dm.UserError as error:
            assert not fit and "gives something else than the model itself" in str(error)
        else:
            assert fit and float((found - layer(x)).abs().max()) <= 2e-5 * float(layer(x).abs().max())


def test_models_in_full_precision_are_served(overflowing):
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 8)).eval(), torch.randn(2, 16)
    with torch.no_grad():
        assert torch.allclose(ThroughOpenVINO(model, "float32")(x), model(x), atol=1e-6)
