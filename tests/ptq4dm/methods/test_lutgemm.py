"""LUT-GEMM's recipe: which layers get planes, a recipe for the rest, saved and loaded, wrong options."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

import models
import ptq4dm
from ptq4dm import LUTGEMMConfig, RTNConfig
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.binary.bcq import BCQLinear
from ptq4dm.quantization.recipe import QuantConfig
from trained import spread

CALIBRATION = ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2)


@pytest.fixture(scope="module", params=["dit", "unet"])
def reference(request):
    """(a tiny pipeline, its calibration, a group size that all its layers of few rows have)."""
    if request.param == "dit":
        model = spread(models.pixel_dit(num_attention_heads=2, attention_head_dim=64))
        pipe, size = ptq4dm.PixelDiTPipeline(model, DDIMScheduler(clip_sample=False)), 128
    else:
        model = models.plain_unet(block_out_channels=(32,), norm_num_groups=8)
        pipe, size = DDPMPipeline(model, DDIMScheduler(clip_sample=False)), 32
    return pipe, ptq4dm.collect(pipe, CALIBRATION), size


def fresh(pipe):
    return copy.deepcopy(getattr(pipe, "transformer", None) or pipe.unet)


@pytest.mark.parametrize("name", ["dit-cifar10", "unet-cifar10"])
def test_layers_are_those_of_one_row_a_sample(name):
    """Modulation and embeddings of the DiT; time projections and embeddings of the UNet; and nothing of tokens."""
    pipe = ptq4dm.load_reference(name)
    model, store = fresh(pipe), ptq4dm.collect(pipe, CALIBRATION)
    plan = LUTGEMMConfig(bits=2).resolve(model, ptq4dm.layers.view.find_layers(model), store)
    parts = ("norm1.linear", "timestep_embedder", "proj_out_1") if name == "dit-cifar10" else ("time_emb",)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(p in n for p in parts)}
    assert set(plan) == linears and len(plan) > 15
    assert {str(choice) for choice in plan.values()} == {"W2A16 bcq g128 uniform refitted"}


def test_they_are_packed_and_the_others_kept(reference):
    pipe, store, size = reference
    model = fresh(pipe)
    report = ptq4dm.quantize(model, LUTGEMMConfig(bits=2, group_size=size), store)
    layers = {row["layer"] for row in report.layers}
    assert layers and all(type(model.get_submodule(layer)) is BCQLinear for layer in layers)
    assert {name for name, one in model.named_modules() if is_quantized(one)} == layers
    assert {row["format"] for row in report.layers} == {f"W2A16 bcq g{size} uniform refitted"}


def test_a_recipe_for_the_rest(reference):
    pipe, store, size = reference
    model = fresh(pipe)
    written, given = (
        LUTGEMMConfig(rest=rest, group_size=size)
        for rest in ("rtn activations=dynamic", RTNConfig(activations="dynamic"))
    )
    assert written.rest.summary() == given.rest.summary() and written.to_dict() == given.to_dict()
    config = written if hasattr(pipe, "unet") else given
    report = ptq4dm.quantize(model, config, store)
    formats = {row["format"] for row in report.layers}
    assert formats == {f"W3A16 bcq g{size} uniform refitted", "W8A8 dynamic"}
    told = {"method": "lutgemm", "rest": {"method": "rtn", "activations": "dynamic"}}
    assert report.method == (told if size == LUTGEMMConfig.group_size else told | {"group_size": size})
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


def test_groups_that_do_not_fit_are_smaller():
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
        ptq4dm.quantize(models.pixel_dit(), LUTGEMMConfig())
