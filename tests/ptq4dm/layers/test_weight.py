"""`weight` of a quantized layer: facts of the float weight, values for the few who mean the dequantized ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import normal
from ptq4dm.errors import UserError
from ptq4dm.layers.binary.bcq import BCQPlan
from ptq4dm.layers.codebook import CodebookPlan
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.layers.power import PowerPlan
from ptq4dm.layers.registry import FORMATS, quantized_copy
from ptq4dm.layers.row_mix import RowMixPlan
from ptq4dm.svdquant.layers.nvfp4 import NVFP4Linear, NVFP4Plan
from ptq4dm.svdquant.layers.plan import SVDQPlan
from ptq4dm.svdquant.layers.split import SplitLinear, SplitPlan
from ptq4dm.svdquant.layers.svdq import SVDQConv2d, SVDQLinear

PLANS = {
    "int8": LayerPlan(),
    "fp8": LayerPlan("fp8"),
    "int4": Int4Plan(),
    "groups": Int4Plan(group_size=64),
    "row-mix": RowMixPlan(wide=[2, 5, 31]),
    "codebook": CodebookPlan(group_size=32),
    "power": PowerPlan(weight_bits=4),
    "power8": PowerPlan(),
}


def float_layer(conv=False, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return (nn.Conv2d(64, 32, 1, bias=bias) if conv else nn.Linear(128, 64, bias=bias)).to(dtype)


def filled(layer):
    """A layer that is made from files, with small numbers in all tensors."""
    for tensor in layer.parameters():
        values = normal(*tensor.shape).abs() + 0.5 if tensor.ndim else tensor
        tensor.data = values.to(tensor.dtype) if tensor.is_floating_point() else torch.full_like(tensor, 0x79)
    return layer


def layers(bias=True, dtype=torch.float32):
    """A layer of every format, Linear and convolution."""
    for plan in PLANS.values():
        for conv in (False, True):
            yield quantized_copy(float_layer(conv, bias, dtype), plan, "layer")
    linear = float_layer(bias=bias, dtype=dtype)
    for plan in (BCQPlan(group_size=64), BCQPlan(weight_bits=2, uniform=True)):
        yield quantized_copy(linear, plan, "layer")
    for activation in ("int4", "int8", "fp8", "none"):
        plan = SVDQPlan(activation=activation, rank=8)
        yield filled(SVDQLinear(linear, plan))
        yield filled(SVDQConv2d(float_layer(True, bias, dtype), plan))
    yield filled(NVFP4Linear(linear, NVFP4Plan(rank=8)))
    yield filled(SplitLinear(linear, SplitPlan(inputs=[64, 64], parts=[SVDQPlan(rank=4), SVDQPlan(rank=4)])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_facts_of_the_float_weight(bias, dtype):
    seen = set()
    for layer in layers(bias, dtype):
        expected = float_layer(isinstance(layer, nn.Conv2d), bias, dtype).weight
        weight = layer.weight
        seen.add(layer.plan.format)
        assert weight.shape == expected.shape and weight.size(0) == len(weight) == len(expected)
        assert weight.dtype == weight.data.dtype == dtype and weight.is_floating_point()
        assert (weight.device, weight.ndim, weight.numel()) == (expected.device, expected.ndim, expected.numel())
        assert not weight.requires_grad and not weight.is_meta and type(layer).__name__ in repr(weight)
        assert next(layer.parameters()).dtype == dtype  # by which diffusers and transformers tell a model's
        assert torch.zeros(2, dtype=torch.float64).to(weight).dtype == dtype
        assert torch.zeros_like(weight).shape == weight.shape and weight.new_ones(3).dtype == dtype
        assert copy.deepcopy(layer).to("meta").weight.is_meta
    assert seen >= {"int8", "fp8", "int4", "row-mix", "codebook", "power", "bcq", "svdq", "svdq-split", "nvfp4"}
    assert seen <= set(FORMATS)


REFUSED = {
    "a sum with a number": lambda w: w + 1,
    "product": lambda w: w @ w,
    "scaled": lambda w: 2 * w,
    "transposed": lambda w: w.t(),
    "copy": lambda w: w.clone(),
    "cast": lambda w: w.float() if w.dtype != torch.float32 else w.double(),
    "deep copy": copy.deepcopy,
    "in place": lambda w: w.data.add_(torch.ones(w.shape)),
    "joined": lambda w: torch.cat([w.data, w.data]),
    "filled": nn.init.zeros_,
    "set": lambda w: setattr(w, "data", torch.ones(w.shape)),
    "trained": lambda w: w.requires_grad_(True),
    "compared": lambda w: torch.equal(w, w),
    "numbers": lambda w: w.tolist(),
    "array": lambda w: w.numpy(),
    "memory": lambda w: w.data_ptr(),
    "norm": lambda w: torch.linalg.norm(w),
    "a part set": lambda w: w.__setitem__(0, 1.0),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED.keys())
def test_values_are_refused_with_the_way_out(use):
    for layer in layers():
        if use is REFUSED["transposed"] and layer.weight.ndim != 2:
            continue
        before = [tensor.clone() for tensor in layer.parameters()]
        with pytest.raises(UserError, match=f"{type(layer).__name__}.*dequantized_weight"):
            use(layer.weight)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_a_weight_cannot_be_set():
    layer = quantized_copy(float_layer(), LayerPlan(), "layer")
    with pytest.raises(UserError, match="no weight that could be set"):
        layer.weight = nn.Parameter(torch.ones(64, 128))
    assert set(dict(layer.named_parameters())) == {"bias", "qweight", "weight_scale"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_outside_of_the_layer_use_the_dequantized_weight(dtype):
    for layer in layers(bias=False, dtype=dtype):
        exact, weight = layer.dequantize(), layer.weight
        assert exact.dtype == dtype
        delta = normal(*exact.shape).to(dtype)
        assert torch.equal(weight + delta, exact + delta) and torch.equal(delta + weight, exact + delta)
        assert torch.equal(weight[3:5], exact[3:5])
        if isinstance(layer, nn.Conv2d):
            x = normal(2, 64, 3, 3).to(dtype)
            assert torch.equal(F.conv2d(x, weight), F.conv2d(x, exact))
            continue
        x = normal(5, 128).to(dtype)
        assert torch.equal(F.linear(input=x, weight=weight), F.linear(x, exact))
        assert all(torch.equal(a, b) for a, b in zip(weight.chunk(2), exact.chunk(2), strict=True))
        larger = torch.zeros(64, 256, dtype=dtype)
        larger[:, :128] = weight
        assert torch.equal(larger[:, :128], exact)


def test_attention_that_reads_weights():
    """As HunyuanDiT's pooling has it: its projections are never called."""
    q, k, v, out = (quantized_copy(nn.Linear(64, 64), LayerPlan(), "layer") for _ in range(4))

    def pooled(weight_of):
        x = normal(5, 2, 64)
        return F.multi_head_attention_forward(
            x[:1], x, x, 64, 4, None, torch.zeros(192), None, None, False, 0.0, weight_of(out), out.bias,
            use_separate_proj_weight=True, q_proj_weight=weight_of(q), k_proj_weight=weight_of(k),
            v_proj_weight=weight_of(v), need_weights=False,
        )[0]  # fmt: skip

    assert torch.equal(pooled(lambda layer: layer.weight), pooled(lambda layer: layer.dequantize()))


def test_layers_are_called_by_keyword_and_with_nothing():
    for layer in layers():
        conv = isinstance(layer, nn.Conv2d)
        x = normal(2, 64, 3, 3) if conv else normal(2, 5, 128)
        assert torch.equal(layer(input=x), layer(x))
        for empty in (x[:0], x if conv else x[:, :0], x if conv else x[0, :0]):
            if not empty.numel():
                answer = layer(empty.bfloat16())
                assert answer.dtype == torch.bfloat16 and answer.shape == float_layer(conv)(empty).shape


class Reads(nn.Module):
    """As Z-Image's embedder and T5 cast what they are given to the dtype of a weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        kind = self.layer.weight.dtype
        y = self.layer(input=x.to(kind) if kind.is_floating_point else x)
        return y + F.linear(x.to(kind), self.layer.weight)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_compiled_without_a_break(plan):
    torch._dynamo.reset()
    model, x = Reads(quantized_copy(float_layer(bias=False), plan, "layer")), normal(3, 128)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
