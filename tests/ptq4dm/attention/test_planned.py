"""Attention in 8 bits in a quantized model's plan: followed, saved, loaded, taken out; wrong plans are refused."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel

import ptq4dm
from ptq4dm import Plan, UserError, attention_errors, plan_attention
from ptq4dm.layers.attention.planned import attention_of
from ptq4dm.layers.plan import AttentionPlan
from ptq4dm.quantization.diffusers_bridge import quantization_config
from tests.support import models

NAMES = [f"transformer_blocks.{i}.attn1" for i in (0, 1)]


@torch.no_grad()
def run(model):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([400, 400]), class_labels=torch.tensor([3, 7])).sample


def quantized():
    model = models.dit()
    ptq4dm.quantize(model, ptq4dm.RTNConfig(activations="dynamic"))
    return model


def test_it_is_saved_and_loaded(tmp_path):
    model = quantized()
    before = run(model)
    state = plan_attention(model, layers=NAMES[1:])
    y = run(model)
    assert not torch.equal(y, before) and state.kernels == {"reference": 1} and attention_of(model) is state
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["plan"]
    assert saved["attention"] == {NAMES[1]: {"kind": "int8", "error": None}}
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), y) and attention_of(loaded).layers == NAMES[1:]
    assert quantization_config(loaded).plan.attention == {NAMES[1]: AttentionPlan()}
    assert plan_attention(loaded, None) is None and attention_of(loaded) is None
    assert torch.equal(run(loaded), before)


def test_a_plan_is_followed():
    model = quantized()
    plan_attention(model, "e4m3")
    y, plan = run(model), quantization_config(model).plan
    again = models.dit()
    ptq4dm.quantize(again, ptq4dm.RTNConfig(activations="dynamic", plan=Plan.from_dict(plan.to_dict())))
    assert torch.equal(run(again), y) and attention_of(again).layers == NAMES
    again.dequantize()
    assert attention_of(again) is None


def test_errors_choose():
    model = quantized()
    errors = attention_errors(model, lambda: run(model))
    first, second = (errors.error(name) for name in NAMES)
    state = plan_attention(model, errors=errors, bound=(first + second) / 2)
    kept = NAMES[0] if first < second else NAMES[1]
    assert state.layers == [kept]
    assert quantization_config(model).plan.attention == {kept: AttentionPlan("int8", min(first, second))}
    assert plan_attention(model, errors=errors, bound=0) is None


def test_wrong():
    with pytest.raises(UserError, match="quantize it first"):
        plan_attention(models.dit())
    model = quantized()
    with pytest.raises(UserError, match="kind must be 'int8' or 'e4m3', or None; got 'int4'"):
        plan_attention(model, "int4")
    with pytest.raises(UserError, match="names 'nowhere' as attention, which is not there"):
        plan_attention(model, layers=["nowhere"])
    with pytest.raises(UserError, match="bound is a share from 0 on, and goes with errors"):
        plan_attention(model, bound=0.1)
    assert attention_of(model) is None
    plan = quantization_config(model).plan.copy()
    plan.attention = {"nowhere": AttentionPlan()}
    with pytest.raises(UserError, match="which is not there"):
        ptq4dm.quantize(models.dit(), ptq4dm.RTNConfig(activations="dynamic", plan=plan))
    for wrong in ({"kind": "int4", "error": None}, {"kind": "int8", "error": -1.0}, {"kind": "int8"}, 3):
        data = plan.to_dict() | {"attention": {NAMES[0]: wrong}}
        with pytest.raises(UserError):
            Plan.from_dict(data).check()
