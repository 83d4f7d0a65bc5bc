"""LoRA adapters as further ranks of the low-rank branch."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import denoisers
import ptq4dm
from helpers import same
from ptq4dm import SVDQuantConfig
from ptq4dm.calibration.record import replay
from ptq4dm.errors import UserError
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.svdquant import fuse_lora, scale_lora, unfuse_lora
from ptq4dm.svdquant.group import Group, refine, round_rest
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.layers.svdq import SVDQLinear
from ptq4dm.svdquant.packing import build_layer
from ptq4dm.undo import whole_or_not
from states import interrupted_at, state_of

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


def test_adapters_that_are_not_finite_are_refused(model):
    adapt(model, "one", 4)
    with torch.no_grad():
        model[1].lora_B["one"].weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="adapter 'one' on layer '1' holds NaN or infinity"):
        fuse_lora(model)
    assert not model[0].base_layer.plan.adapters


def test_only_active_adapters_are_fused_with_the_weights_they_were_set_to(model):
    x = torch.randn(5, 64)
    adapt(adapt(model, "one", 4), "two", 2)
    for layer in (model[0], model[1]):
        layer.set_adapter(["one"])
        layer.set_scale("one", 0.5)
    on_top = model(x)
    assert fuse_lora(model) == {"one": 2}
    torch.testing.assert_close(model(x), on_top, atol=2e-3, rtol=0)
    assert model[0].base_layer.plan.adapters == {"one": [4, 0.5]} and set(model[0].lora_A) == {"two"}
    for layer in (model[0], model[1]):  # the other one waits until it is switched on
        layer.set_adapter(["two"])
    both = model(x)
    assert (both - on_top).abs().max() > 0.01
    assert fuse_lora(model) == {"two": 2} and isinstance(model[0], SVDQLinear)
    torch.testing.assert_close(model(x), both, atol=2e-3, rtol=0)


def test_adapters_that_are_switched_off_stay_where_they_are(model):
    x = torch.randn(5, 64)
    before = model(x)
    adapt(model, "one", 4)
    for layer in (model[0], model[1]):
        layer.enable_adapters(False)
    assert fuse_lora(model) == {} and torch.equal(model(x), before) and hasattr(model[0], "lora_A")


def test_saved_and_loaded(tmp_path):
    """The file has the adapters by name: loaded, they are scaled and taken out as before."""
    model, store, _ = denoisers.quantized("flux")
    model = copy.deepcopy(model)
    plain = replay(model, store.calls)
    model.save_pretrained(tmp_path / "plain")  # the entry of the recipe is written anew when adapters come
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "net.2"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), "style")
    model.set_adapters("style", 0.5)
    fuse_lora(model)
    assert not hasattr(model, "peft_config") and "+style" in str(model.transformer_blocks[0].attn.to_q.plan)
    fused = replay(model, store.calls)
    assert (fused - plain).norm() > 0.05 * plain.norm()
    model.save_pretrained(tmp_path / "fused")
    again = type(model).from_pretrained(tmp_path / "fused")
    assert torch.equal(replay(again, store.calls), fused)
    for one in (model, again):
        scale_lora(one, {"style": 1.0})
    assert torch.equal(replay(again, store.calls), replay(model, store.calls))
    plan = quantization_config(again).plan
    with pytest.raises(UserError, match="the plan is of a model with adapters in '"):
        ptq4dm.quantize(denoisers.pair("flux")[0], SVDQuantConfig(plan=plan), store)
    unfuse_lora(again)
    assert torch.equal(replay(again, store.calls), plain)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(replay(type(model).from_pretrained(tmp_path / "again"), store.calls), plain)


def test_interrupted_adapters_are_as_they_were(model):
    """Ctrl-C in the middle of fusing, scaling and taking out: on all layers or on none."""
    adapt(model, "one", 4)

    def undone(work):
        def change(gate):
            work(model)
            raise KeyboardInterrupt

        whole_or_not([model], change)

    for work in (fuse_lora, lambda model: scale_lora(model, {"one": 0.5}), unfuse_lora):
        before, lines = state_of(model), 0
        with pytest.raises(KeyboardInterrupt):
            undone(work)
        assert state_of(model) == before
        work(done := copy.deepcopy(model))
        while interrupted_at(lines := lines + 23, lambda work=work: work(model)) and state_of(model) == before:
            pass
        assert lines > 100 and [(name, type(part)) for name, part in model.named_modules()] == [
            (name, type(part)) for name, part in done.named_modules()
        ]
        assert all(model[i].plan == done[i].plan for i in range(2)) and same(model, done)
