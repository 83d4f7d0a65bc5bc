"""LoRA adapters as further ranks of the low-rank branch."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from ptq4dm.errors import UserError
from ptq4dm.svdquant import fuse_lora, scale_lora, unfuse_lora
from ptq4dm.svdquant.group import Group, refine, round_rest
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.layers.svdq import SVDQLinear
from ptq4dm.svdquant.packing import build_layer

pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(linear: nn.Linear, rows: torch.Tensor, plan: SVDQPlan) -> SVDQLinear:
    weight = linear.weight.detach()
    group = Group(weight, rows, rows.abs().amax(0), plan, torch.float16)
    split = round_rest(group, refine(group, group.divisors(0.5, 0.5)))
    return build_layer(linear, plan, split, slice(0, len(weight)), torch.float16, None)


@pytest.fixture
def model():
    """Two quantized layers, one without a branch of its own, and a plain one."""
    torch.manual_seed(0)
    rows = torch.randn(64, 64)
    first = quantized(nn.Linear(64, 128), rows, SVDQPlan(rank=8))
    second = quantized(nn.Linear(128, 64), torch.randn(64, 128), SVDQPlan(rank=0, activation="int8"))
    return nn.Sequential(first, second, nn.Linear(64, 3)).eval()


def adapt(model, name: str, rank: int, targets=("0", "1")):
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_" in key and f".{name}." in key:
            nn.init.normal_(parameter, std=0.05)
    return model


def test_fused_is_what_peft_computes_and_unfusing_restores_the_bits(model):
    x = torch.randn(5, 64)
    before, codes = model(x), model[0].qweight.clone()
    adapt(model, "one", 4)
    on_top = model(x)
    assert (on_top - before).abs().max() > 0.05

    assert fuse_lora(model) == {"one": 2}
    assert isinstance(model[0], SVDQLinear) and isinstance(model[1], SVDQLinear)  # no wrapper is left
    assert model[0].branch[0].shape == (12, 64) and model[1].branch[1].shape == (64, 4)
    torch.testing.assert_close(model(x), on_top, atol=2e-3, rtol=0)  # the ranks are 16-bit
    assert torch.equal(model[0].qweight, codes)

    unfuse_lora(model)
    assert torch.equal(model(x), before)


def test_several_adapters_with_strengths(model):
    x = torch.randn(5, 64)
    before = model(x)
    adapt(model, "one", 4)
    fuse_lora(model, {"one": 0.5})
    half = model(x)
    adapt(model, "two", 2)
    fuse_lora(model)
    assert model[0].branch[0].shape == (14, 64)
    both = model(x)
    unfuse_lora(model, ["two"])
    assert torch.equal(model(x), half) and not torch.equal(both, half)

    scale_lora(model, {"one": 1.0})  # as trained: alpha / rank, which is not 1 here, counts in both functions
    whole = model(x)
    torch.testing.assert_close(whole - before, 2 * (half - before), atol=0.02, rtol=0)
    scale_lora(model, {"one": 0.0})
    torch.testing.assert_close(model(x), before)
    with pytest.raises(UserError, match="no adapter 'two' is fused; fused are: one"):
        scale_lora(model, {"two": 1.0})
    with pytest.raises(UserError, match="strengths by the names of adapters"):
        scale_lora(model, 0.5)
    unfuse_lora(model)
    with pytest.raises(UserError, match="no adapter is fused"):
        unfuse_lora(model)


def test_adapters_elsewhere_stay_with_peft(model):
    x = torch.randn(5, 64)
    adapt(model, "one", 4, targets=("0", "2"))
    on_top = model(x)
    assert fuse_lora(model) == {"one": 1}
    assert hasattr(model[2], "lora_A")
    torch.testing.assert_close(model(x), on_top, atol=2e-3, rtol=0)


def test_fused_adapters_move_with_the_model(model):
    adapt(model, "one", 4)
    fuse_lora(model)
    model.to(torch.float64)
    assert model[0].lora_up.dtype == torch.float16


def test_wrong_input(model):
    with pytest.raises(UserError, match="no LoRA adapter is on an SVDQuant layer"):
        fuse_lora(model)
    adapt(model, "one", 4)
    with pytest.raises(UserError, match="there is no adapter 'other' to scale; there are one"):
        fuse_lora(model, {"other": 1.0})
    assert hasattr(model[0], "lora_A")  # nothing was changed
