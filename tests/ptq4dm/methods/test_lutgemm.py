"""LUT-GEMM's recipe: which layers get planes, a recipe for the rest, saved and loaded, wrong options."""

import copy

import pytest
import torch

import ptq4dm
from ptq4dm import LUTGEMMConfig, RTNConfig
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.binary.bcq import BCQLinear
from ptq4dm.quantization.recipe import QuantConfig

CALIBRATION = ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2)


@pytest.fixture(scope="module", params=["dit-cifar10", "unet-cifar10"])
def reference(request):
    pipe = ptq4dm.load_reference(request.param)
    return pipe, ptq4dm.collect(pipe, CALIBRATION), request.param


def fresh(pipe):
    return copy.deepcopy(getattr(pipe, "transformer", None) or pipe.unet)


def test_layers_are_those_of_one_row_a_sample(reference):
    """Modulation and embeddings of the DiT; time projections and embeddings of the UNet; and nothing of tokens."""
    pipe, store, name = reference
    model = fresh(pipe)
    report = ptq4dm.quantize(model, LUTGEMMConfig(bits=2), store)
    layers = {row["layer"] for row in report.layers}
    parts = ("norm1.linear", "timestep_embedder", "proj_out_1") if name == "dit-cifar10" else ("time_emb",)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(p in n for p in parts)}
    assert layers == linears and len(layers) > 15
    assert all(type(model.get_submodule(layer)) is BCQLinear for layer in layers)
    assert {row["format"] for row in report.layers} == {"W2A16 bcq g128 uniform refitted"}


@pytest.mark.parametrize("rest", ["rtn activations=dynamic", RTNConfig(activations="dynamic")])
def test_a_recipe_for_the_rest(reference, rest, tmp_path):
    pipe, store, _ = reference
    model = fresh(pipe)
    config = LUTGEMMConfig(rest=rest)
    report = ptq4dm.quantize(model, config, store)
    formats = {row["format"] for row in report.layers}
    assert formats == {"W3A16 bcq g128 uniform refitted", "W8A8 dynamic"}
    assert report.method == {"method": "lutgemm", "rest": {"method": "rtn", "activations": "dynamic"}}
    saved = ptq4dm.quantization_config(model)
    again = QuantConfig.from_dict(saved.to_dict())
    assert again.rest.summary() == config.rest.summary() and again.plan == saved.plan
    second = fresh(pipe)
    ptq4dm.quantize(second, LUTGEMMConfig(plan=saved.plan), store)
    first = model.state_dict()
    assert all(torch.equal(tensor, first[key]) for key, tensor in second.state_dict().items())


def test_saved_and_loaded(reference, tmp_path):
    pipe, store, _ = reference
    pipe = copy.deepcopy(pipe)
    ptq4dm.quantize(pipe, LUTGEMMConfig(bits=4, group_size=64), store)
    pipe.save_pretrained(tmp_path)
    loaded = ptq4dm.load_pipeline(tmp_path)
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    one, other = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert any(is_quantized(module) and module.woffsets is not None for module in getattr(loaded, name).modules())
    ptq4dm.verify(tmp_path)


def test_groups_that_do_not_fit_are_smaller(reference):
    pipe, store, name = reference
    from ptq4dm.layers.view import LayerView

    plan = lambda inputs, size: LUTGEMMConfig(group_size=size)._plan(  # noqa: E731
        LayerView("x", torch.nn.Linear(inputs, 8))
    )
    assert [plan(inputs, 128).group_size for inputs in (256, 320, 96, 50)] == [128, 64, 32, None]
    assert plan(256, None).group_size is None and plan(96, 64).group_size == 32


def test_planes_are_uniform_above_one_bit_where_nothing_is_said(reference):
    pipe, store, _ = reference
    kinds = {}
    for bits, planes in ((1, None), (2, None), (4, "fitted"), (2, "uniform")):
        model = fresh(pipe)
        plan = LUTGEMMConfig(bits=bits, planes=planes).resolve(model, ptq4dm.layers.view.find_layers(model), store)
        kinds[bits, planes] = {choice.uniform for choice in plan.values()}
    assert kinds == {(1, None): {False}, (2, None): {True}, (4, "fitted"): {False}, (2, "uniform"): {True}}


@pytest.mark.parametrize("rounding, refits, found", [("gptq", None, 4), ("gptq", 0, 0), ("nearest", None, 0)])
def test_refits_follow_the_rounding(rounding, refits, found):
    config = LUTGEMMConfig(rounding=rounding, refits=refits)
    assert config._plan(ptq4dm.layers.view.LayerView("x", torch.nn.Linear(128, 8))).refits == found


def test_tuples_are_those_of_the_recipe_that_wants_more():
    few = LUTGEMMConfig(num_tuples=16, rest="rtn activations=dynamic num_tuples=40")
    assert LUTGEMMConfig().packing_options() == {"num_tuples": 256}
    assert few.packing_options()["num_tuples"] == 40


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 100}, "group_size must be None, 32, 64 or 128; got 100"),
        ({"planes": "none"}, "planes must be one of fitted, uniform"),
        ({"planes": "uniform", "rounds": 3}, "change nothing of a uniform grid"),
        ({"planes": "uniform", "emphasis": 0.0}, "change nothing of a uniform grid"),
        ({"emphasis": -1.0}, "emphasis"),
        ({"rest": 3}, "rest is a recipe"),
        ({"rest": "nobody"}, "'nobody' is unknown"),
        ({"rest": "rtn bits"}, "rest 'rtn bits': 'bits' is no option"),
        ({"rest": "ohq"}, "rest 'ohq': 'ohq' has no plan of its own"),
        ({"rest": "rtn transforms=('rotate',)"}, "are of the whole model"),
        ({"rest": "gradptq"}, "trains whole blocks"),
        ({"rest": "lutgemm bits=4"}, "rest is of the layers that LUT-GEMM leaves"),
        ({"rounding": "learned"}, "does not serve"),
        ({"rounding": "nearest", "refits": 1}, "rounding .nearest. does not; take gptq"),
        ({"refits": -1}, "refits"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(UserError, match=text):
        LUTGEMMConfig(**options)


def test_a_store_is_needed():
    with pytest.raises(UserError, match="LUTGEMMConfig needs calibration"):
        ptq4dm.quantize(ptq4dm.load_reference("dit-cifar10").transformer, LUTGEMMConfig())
