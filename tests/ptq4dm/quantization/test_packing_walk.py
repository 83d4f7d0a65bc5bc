"""Packing by one walk through the model: the codes are those of blocks that run from the model's start."""

import copy

import pytest
import torch
from torch import nn

import denoisers
import ptq4dm
from helpers import same
from ptq4dm.hooks import hooked
from ptq4dm.walk import walk
from trained import FEW, calls_of, codes, model_of

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = {
    "gptq": ptq4dm.PTQ4DMConfig(weight_bits=4, rounding="gptq", num_tuples=3, objective="mse"),
    "gptq behind quantized": ptq4dm.PTQ4DMConfig(
        weight_bits=4, rounding="gptq", num_tuples=3, objective="mse", prefix="quantized", first_last="same"
    ),
    "output error": ptq4dm.PTQ4DMConfig(activations="static", objective="output", num_tuples=3),
    "gradptq fisher": ptq4dm.GradPTQConfig(
        **FEW | {"num_tuples": 3, "steps": 2, "start": "gptq"}, loss="fisher", augmentation="qdrop"
    ),
    "gradptq": ptq4dm.GradPTQConfig(**FEW | {"num_tuples": 3, "steps": 2}),
    "gradptq by layers": ptq4dm.GradPTQConfig(**FEW | {"num_tuples": 3, "steps": 2}, unit="layer", prefix="exact"),
    "pdquant": ptq4dm.PDQuantConfig(
        **FEW | {"num_tuples": 3, "steps": 2},
        weight_bits=4,
        rounding="learned",
        activations="dynamic",
        correction=True,
    ),
}


def quantized(model, config, calls):
    model = copy.deepcopy(model)
    ptq4dm.quantize(model, config, calls)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    return codes(model)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["shallow", "small"])
def test_codes_are_those_of_blocks_that_run_from_the_start(kind, recipe, monkeypatch):
    model = model_of(kind)
    calls = calls_of(model, 4)
    found = quantized(model, RECIPES[recipe], calls)
    monkeypatch.setattr(walk.Walks, "take", lambda *_: None)  # no room for anything
    assert len(found) > 20 and same(found, quantized(model, RECIPES[recipe], calls))


SVDQUANT = ptq4dm.SVDQuantConfig(rank=8, num_tuples=3, refinements=1)
TRAINED = ptq4dm.GradPTQConfig(num_tuples=3, steps=2, step_tuples=2, learning_rate=0.02)


@pytest.mark.parametrize("kind, config", [("flux", TRAINED), ("sd3", SVDQUANT)])
def test_codes_of_models_with_several_streams_are_too(kind, config, monkeypatch):
    model, store = denoisers.pair(kind)
    found = quantized(model, config, store)
    monkeypatch.setattr(walk.Walks, "take", lambda *_: None)
    assert len(found) > 20 and same(found, quantized(model, config, store))


@pytest.mark.parametrize("recipe", ["gptq behind quantized", "output error", "gradptq"])
def test_blocks_are_run_as_often_in_a_model_of_more_blocks(recipe):
    """Calls of a block for each tuple: not more of them where more blocks are around it."""
    calls_of_one = []
    for layers in (1, 3):
        model, calls = long_dit(layers)
        ran = []
        forward = type(model.transformer_blocks[0]).forward

        def counted(self, *args, ran=ran, forward=forward, **kwargs):
            ran.append(self)
            return forward(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model.transformer_blocks[0]), "forward", counted)
            ptq4dm.quantize(model, RECIPES[recipe], calls)
        calls_of_one.append(len(ran) / layers)
    few, many = calls_of_one
    assert many <= few * 1.1


def long_dit(layers):
    torch.manual_seed(0)
    model = denoisers.diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=layers, sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    denoisers._spread(model)
    return model, calls_of(model, 3)


def test_hooks_of_offloading_are_there_afterwards_and_change_nothing():
    accelerate = pytest.importorskip("accelerate")
    model = model_of("unet")
    calls = calls_of(model, 4)
    config = ptq4dm.PTQ4DMConfig(weight_bits=4, rounding="gptq", num_tuples=3, objective="mse", prefix="quantized")
    plain = quantized(model, config, calls)
    offloaded = copy.deepcopy(model)
    for module in offloaded.modules():
        if isinstance(module, nn.GroupNorm) or type(module).__name__ == "ResnetBlock2D":
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    with hooked(offloaded):
        ptq4dm.quantize(offloaded, config, calls)
    assert same(codes(offloaded), plain)
    assert any(hasattr(module, "_hf_hook") and "forward" in vars(module) for module in offloaded.modules())
