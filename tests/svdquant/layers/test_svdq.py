"""SVDQuant's layers in other hands: copied, cast, counted, compiled, offloaded, dequantized."""

import copy
import gc
import weakref
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

import denoisers
from ptq4dm.calibration.record import replay
from ptq4dm.layers.registry import empty_quantized
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.svdquant.group import Group, split_weight
from ptq4dm.svdquant.layers.nvfp4 import NVFP4Linear, NVFP4Plan
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.layers.split import SplitLinear, SplitPlan
from ptq4dm.svdquant.layers.svdq import SVDQConv2d, SVDQLinear
from ptq4dm.svdquant.packing import build_layer

pytestmark = pytest.mark.usefixtures("one_thread")

QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
SHIFTED = "transformer_blocks.0.ff.net.2"
EMBEDDED = "transformer_blocks.0.norm1.linear"


@pytest.fixture
def made():
    """(a quantized model, its store, its report). Tests must not change it."""
    return denoisers.quantized("flux")


def test_dequantized_is_the_quantized_model_with_exact_inputs(made):
    model, store = copy.deepcopy(made[0]), made[1]
    assert model.get_submodule(SHIFTED).plan.shift > 0
    for module in model.modules():
        if isinstance(module, SVDQLinear):
            module.plan = replace(module.plan, activation="none")
    expected = replay(model, store.calls)
    model = copy.deepcopy(made[0])
    model.dequantize()
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())
    answer = replay(model, store.calls)
    assert (answer - expected).norm() < 1e-4 * expected.norm()
    assert (answer - replay(made[0], store.calls)).norm() > 1e-2 * expected.norm()  # which rounds its inputs
    layer = model.get_submodule(QKV[1])
    assert type(layer) is nn.Linear and layer.weight.shape == (64, 64)


def test_copies_have_their_own_shared_branch(made):
    model = copy.deepcopy(made[0])
    first, *others = (model.get_submodule(name) for name in QKV)
    assert all(layer.branch[0] is first.down for layer in others)
    assert first.down is not made[0].get_submodule(QKV[0]).down
    answer = replay(model, made[1].calls)
    assert torch.equal(answer, replay(made[0], made[1].calls))
    first.down.data.zero_()
    assert not torch.equal(replay(model, made[1].calls), answer)
    alone = copy.deepcopy(made[0].get_submodule(QKV[1]))  # takes its lender along
    x = torch.randn(3, 64)
    assert torch.equal(alone(x), made[0].get_submodule(QKV[1])(x))


def test_loaded_layers_share_as_the_saved_do(made, tmp_path):
    made[0].save_pretrained(tmp_path)
    model = type(made[0]).from_pretrained(tmp_path)
    first, *others = (model.get_submodule(name) for name in QKV)
    assert {layer.branch[0].data_ptr() for layer in others} == {first.down.data_ptr()}
    assert stored_bytes(model) == stored_bytes(made[0]) == made[2].bytes_after


def test_a_shared_branch_is_counted_once(made):
    first, second, _ = (made[0].get_submodule(name) for name in QKV)
    assert stored_bytes(first) - stored_bytes(second) == 2 * 8 * 64
    pair = nn.Sequential(first, second)
    assert stored_bytes(pair) == stored_bytes(first) + stored_bytes(second)
    assert "1.down" not in pair.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_leave_codes_scales_and_branch(made, dtype):
    layer = copy.deepcopy(made[0].get_submodule(SHIFTED))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype)
    for name, tensor in layer.state_dict().items():
        if name == "bias":
            assert tensor.dtype == dtype and torch.equal(tensor, before[name].to(dtype))
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert before["wscales"].dtype == torch.float16  # of a float32 model
    layer.float().half().float()
    assert layer.wscales.dtype == torch.float16 and layer.qweight.dtype == torch.uint8


def test_layer_by_layer_offloading_finds_the_shared_branch(made):
    model = copy.deepcopy(made[0])
    expected = replay(model, made[1].calls)
    call = made[1].calls.call()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        answer = model(*call.args, **call.kwargs)[0]
    assert all(model.get_submodule(name).qweight.is_meta for name in QKV)  # they are away again
    assert torch.equal(answer, expected)


def test_a_model_is_freed_with_its_last_name(made):
    model = copy.deepcopy(made[0])
    gc.collect()
    gc.disable()
    try:
        tensors = [weakref.ref(layer.qweight) for layer in model.modules() if isinstance(layer, SVDQLinear)]
        del model
        assert tensors and not any(ref() is not None for ref in tensors)  # without waiting for the collector
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [QKV[0], QKV[1], SHIFTED, EMBEDDED])
def test_compiled_layers_give_the_same_bits(made, name):
    torch._dynamo.reset()
    layer = made[0].get_submodule(name)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("activation", ["int4", "int8", "fp8"])
def test_compiled_convolutions_give_the_same_bits(activation):
    torch._dynamo.reset()
    rows = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    conv = nn.Conv2d(64, 24, 1)
    plan = SVDQPlan(rank=4, alpha=0.5, beta=0.5, activation=activation)
    group = Group(conv.weight.detach().flatten(1), rows, rows.abs().amax(0), plan, torch.float16)
    split = split_weight(group, group.divisors(0.5, 0.5))
    layer = build_layer(conv, plan, split, slice(None), torch.float16, None)
    assert isinstance(layer, SVDQConv2d)
    x = rows.view(2, 5, 10, 64).movedim(-1, 1)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_layers_print_what_they_are(made):
    assert repr(made[0].get_submodule(SHIFTED)) == "SVDQLinear(256, 64, W4A4 g64 r8)"
    assert repr(made[0].get_submodule(EMBEDDED)) == "SVDQLinear(64, 384, W4A16 g64)"
    empty = empty_quantized(nn.Conv2d(64, 8, 1), SVDQPlan(rank=0, activation="int8"), "meta")
    assert repr(empty) == "SVDQConv2d(64, 8, 1x1, W4A8 g64)" and empty.weight.shape == (8, 64, 1, 1)


@pytest.mark.parametrize("activation", ["int4", "int8", "fp8", "none"])
def test_a_backward_pass_is_refused(activation):
    """Its rounding would give no gradient, and the branch one: that of another function."""
    layer = SVDQLinear(nn.Linear(64, 64), SVDQPlan(activation=activation, rank=4))
    for tensor in layer.parameters():
        tensor.data = torch.ones_like(tensor)
    x = torch.ones(3, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer(x.detach()))
    with pytest.raises(RuntimeError, match="quantized layers have no gradient"):
        y.sum().backward()
    assert x.grad is None


def test_other_formats_of_checkpoints_have_no_gradient_either():
    parts = SplitPlan(inputs=[64, 64], parts=[SVDQPlan(rank=4), SVDQPlan(rank=4)])
    for layer in (SplitLinear(nn.Linear(128, 64), parts), NVFP4Linear(nn.Linear(128, 64), NVFP4Plan(rank=4))):
        for tensor in layer.parameters():
            tensor.data = torch.ones_like(tensor)
        with pytest.raises(RuntimeError, match="quantized layers have no gradient"):
            layer(torch.ones(3, 128, requires_grad=True)).sum().backward()


def test_a_borrowed_projection_is_read_from_disk(tmp_path, one_thread):
    """Offloaded leaf by leaf, what the lender holds in memory is not its tensor."""
    model, store, _ = denoisers.quantized("pixart")
    model = copy.deepcopy(model)
    right = replay(model, store.calls)
    place = torch.device("cpu")
    apply_group_offloading(model, place, place, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    lent = [layer._lender[0] for layer in model.modules() if getattr(layer, "_lender", ())]
    for lender in lent:
        lender.down.data.fill_(7)
    assert lent and torch.equal(replay(model, store.calls), right)


def test_a_shifted_layer_is_dequantized_without_the_bias_that_it_added():
    layer = SVDQLinear(nn.Linear(64, 64, bias=False), SVDQPlan(activation="int4", rank=4, shift=0.171875))
    assert layer.bias is not None and layer.like is None
    for tensor in layer.parameters():
        tensor.data = torch.ones_like(tensor)
    assert layer.dequantized().bias is None
