"""SVDQuant without data: codes and branch of a weight alone, roles from the structure, packing while loading."""

import pytest
import torch

import denoisers
import ptq4dm
from helpers import same
from models import dit
from ptq4dm import SVDQuantConfig, UserError
from ptq4dm.allocation.roles import BlockRoles
from ptq4dm.allocation.structure import estimate
from ptq4dm.calibration.trace import trace
from ptq4dm.kernels.formats.int4 import quantize_groups
from ptq4dm.layers.view import find_layers
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.svdquant.layers.data_free import decompose
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.layers.svdq import SVDQLinear

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SVDQuantConfig(evidence="none", activations="int8", rank=8)


def plan(**options):
    return SVDQPlan(**{"rank": 8, "alpha": 0.0, "beta": 0.0, "evidence": "none", "rounding": "nearest"} | options)


def planted(outputs=96, inputs=128, rank=4):
    """A weight of large low-rank part and small rest."""
    torch.manual_seed(0)
    return 5 * torch.randn(outputs, rank) @ torch.randn(rank, inputs) / rank + 0.1 * torch.randn(outputs, inputs)


def left(weight, split):
    return float((weight - split.weight()).norm() / weight.norm())


def test_the_branch_takes_what_is_large():
    weight = planted()
    alone = left(weight, decompose(weight, plan(rank=0), torch.float16))
    with_branch = left(weight, decompose(weight, plan(refinements=0), torch.float16))
    assert with_branch < 0.1 * alone


def test_turns_lower_what_is_left():
    torch.manual_seed(0)
    weight = torch.randn(128, 192) * torch.empty(192).log_normal_(0, 1)
    errors = [left(weight, decompose(weight, plan(refinements=turns), torch.float16)) for turns in (0, 1, 4, 40)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_without_a_branch_it_is_rounding_to_nearest():
    weight = planted()
    codes, scales = quantize_groups(weight, 64, torch.float16)
    split = decompose(weight, plan(rank=0), torch.float16)
    assert torch.equal(split.codes, codes) and torch.equal(split.scales, scales) and split.down is None


@pytest.mark.parametrize("kind", denoisers.KINDS)
def test_roles_from_the_structure_are_those_from_calls(kind):
    model, store = denoisers.pair(kind)
    views = find_layers(model)
    called, estimated = BlockRoles(trace(model, views, store.calls), 32), BlockRoles(estimate(model, views), 32)
    assert {view.name: estimated(view) for view in views} == {view.name: called(view) for view in views}
    assert "w4" in {estimated(view) for view in views}


def test_codes_are_of_the_weight_alone_and_the_model_answers():
    model, store = denoisers.pair("flux")
    before = {view.name: view.weight.detach().clone() for view in find_layers(model)}
    report = ptq4dm.quantize(model, CONFIG)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is SVDQLinear}
    assert layers and report.layers
    for name, layer in layers.items():
        split = decompose(before[name], layer.plan, torch.float16)
        assert torch.equal(layer.dequantized_weight(), split.weight()), name
    assert all(not layer.plan.lender and (layer.smooth == 1).all() for layer in layers.values())
    assert not any(choice.format == "svdq" and choice.activation == "none" for choice in plans(model).values())


def plans(model):
    return quantization_config(model).plan.layers


def test_a_pattern_still_gets_weight_only_layers():
    model, _ = denoisers.pair("dit")
    embedded = "transformer_blocks.0.norm1.linear"
    ptq4dm.quantize(model, SVDQuantConfig(evidence="none", rank=8, roles={embedded: "weight-only"}))
    made = plans(model)
    assert made[embedded].activation == "none"
    assert made["transformer_blocks.1.norm1.linear"].format == "int8"


@pytest.mark.parametrize("rank", [8, 100])
def test_packs_the_same_while_loading(tmp_path, rank):
    """Also where a branch can have less ranks than it was planned with."""
    model = dit(num_attention_heads=2, attention_head_dim=32)
    model.save_pretrained(tmp_path / "float")
    config = SVDQuantConfig(evidence="none", rank=rank, group_size=32)
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    ptq4dm.quantize(model, config)
    assert same(model.state_dict(), loaded.state_dict())
    loaded.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert same(model.state_dict(), again.state_dict())


def test_a_plan_is_followed_to_the_bit():
    model, _ = denoisers.pair("pixart")
    other, _ = denoisers.pair("pixart")
    ptq4dm.quantize(model, CONFIG)
    ptq4dm.quantize(other, SVDQuantConfig(evidence="none", plan=quantization_config(model).plan))
    assert same(model.state_dict(), other.state_dict())


ASKING = [
    {"unsigned": True, "activations": "int4"},
    {"smoothing": 0.5},
    {"smoothing": "exhaustive"},
    {"smoothing": "search"},
    {"rounding": "gptq"},
]


@pytest.mark.parametrize("choice", ASKING)
def test_refuses_what_looks_at_inputs(choice):
    with pytest.raises(UserError, match="evidence='store'"):
        SVDQuantConfig(evidence="none", **choice)


def test_says_what_is_done():
    assert (CONFIG.rounding, CONFIG.smoothing) == ("nearest", "none")
    assert (SVDQuantConfig().rounding, SVDQuantConfig().smoothing) == ("gptq", "search")


def test_a_model_that_loads_is_told_of_the_way_without(tmp_path):
    model = dit(num_attention_heads=2, attention_head_dim=32)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="while a model loads.*evidence='none'"):
        type(model).from_pretrained(tmp_path, quantization_config=SVDQuantConfig())


def test_needs_no_store_and_says_that_there_is_a_way_without():
    assert not CONFIG.needs_calibration and SVDQuantConfig().needs_calibration
    model, _ = denoisers.pair("dit")
    with pytest.raises(UserError, match="evidence='none'"):
        ptq4dm.quantize(model, SVDQuantConfig())


@pytest.mark.parametrize("wrong", [{"alpha": 0.5}, {"lender": "other"}, {"shift": 0.1}, {"evidence": "guess"}])
def test_checks_plans(wrong):
    with pytest.raises(ValueError, match="evidence"):
        plan(**wrong).check()
