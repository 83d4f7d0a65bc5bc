"""What stands for a tensor: torch sees the tensor, to the bit; codes are made once; nobody else is disturbed."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
from torch import nn
from torch.nn import functional as F

import ptq4dm
from ptq4dm.handed import norms as NORMS
from ptq4dm.handed.value import Handed, same_key
from ptq4dm.kernels.w4 import from_codes as w4_codes
from ptq4dm.layers.base import replace_module
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.progressive import ProgressiveLinear, ProgressivePlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.w8a8 import Fp8Linear, Int8Linear

CUDA = torch.cuda.is_available()
K = 64
pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = {
    "int8": (Int8Linear, LayerPlan),
    "fp8": (Fp8Linear, lambda: LayerPlan(format="fp8")),
    "static": (Int8Linear, lambda: LayerPlan(input_scale=0.05, input_zero_point=3)),
    "static fp8": (Fp8Linear, lambda: LayerPlan(format="fp8", input_scale=0.05)),
    "progressive": (ProgressiveLinear, lambda: ProgressivePlan(group_size=64)),
}


def norms():
    """One of each kind, with weights and without, none of them at its start."""
    made = {
        "layer": nn.LayerNorm(K),
        "bare layer": nn.LayerNorm(K, elementwise_affine=False),
        "float32 layer": FP32LayerNorm(K),
        "rms": nn.RMSNorm(K, eps=1e-6),
        "rms of diffusers": RMSNorm(K, eps=1e-6),
        "bare rms": RMSNorm(K, eps=1e-6, elementwise_affine=False),
        "rms with a bias": RMSNorm(K, eps=1e-6, bias=True),
    }
    torch.manual_seed(1)
    for norm in made.values():
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)
    return made


class Attend(nn.Module):
    """Three layers of one input, one of another; the input itself is added at the end."""

    def __init__(self, kind="int8"):
        super().__init__()
        made, plan = FORMATS[kind]
        torch.manual_seed(2)
        for name in ("to_q", "to_k", "to_v", "alone"):
            linear = nn.Linear(K, K)
            layer = made(linear, plan())
            layer.pack(linear.weight.detach(), name)
            layer.put(bias=linear.bias)
            setattr(self, name, layer)
        self.norm_q = nn.LayerNorm(K)  # of what a layer gives: nobody quantizes that here

    def forward(self, x, other=None):
        other = x if other is None else other
        y = self.norm_q(self.to_q(x)) + self.to_k(other) * self.to_v(other)
        return y + self.alone(y.tanh()) + x


class Block(nn.Module):
    def __init__(self, norm, kind="int8", order="after"):
        super().__init__()
        self.norm, self.attn, self.order = norm, Attend(kind), order
        self.head = nn.Linear(K, K)

    def forward(self, x, scale, shift, other=None):
        n = self.norm(x)
        if self.order == "after":
            n = n * (1 + scale[:, None]) + shift[:, None]
        elif self.order == "before":
            n = (1 + scale[:, None]) * n
        elif self.order == "in float32":
            n = ((n.float() * (1 + scale[:, None])) + shift[:, None]).type_as(x)
        elif self.order == "tokens":
            n = n * (1 + scale[:, None]).expand(-1, x.shape[1], -1)
        return x + self.attn(n, other)


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, scale, shift, other=None):
        for block in self.blocks:
            x = block(x, scale, shift, other)
        return x


def inputs(batch=2, tokens=5):
    torch.manual_seed(3)
    return torch.randn(batch, tokens, K) * 2 + 0.5, 0.3 * torch.randn(batch, K), torch.randn(batch, K)


@pytest.fixture
def here(monkeypatch):
    """Takes this device for one with kernels; the ops are the reference, where the processor has kernels, too. Gives
    the calls of ops that make codes."""
    seen = []
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(NORMS, "on_kernels", lambda _: True)
    for kind in (Int8Linear, Fp8Linear, ProgressiveLinear):
        encode = kind.encode

        def counted(self, x, norm, dtype, gate=None, encode=encode):
            seen.append("gate" if gate else None if norm is None else norm[3])
            return encode(self, x, norm, dtype, gate)

        monkeypatch.setattr(kind, "encode", counted)
    return seen


@torch.no_grad()
def answers(model, *args):
    return model.eval()(*args)


@pytest.mark.parametrize("order", ["plain", "after", "before", "in float32"])
@pytest.mark.parametrize("name", list(norms()))
def test_a_norm_is_quantized_with_what_reads_it(name, order, here):
    model, args = Net(Block(norms()[name], "int8", order)), inputs()
    before = answers(model, *args)
    report = ptq4dm.fuse(model)
    assert {"blocks.0.norm", "blocks.0.attn"} <= set(report)
    answer = answers(model, *args)
    assert here == ["rms" if "rms" in name else "layer"]  # once for three layers
    assert (answer - before).abs().max() < 2e-2 * before.abs().max()  # a code on a tie may turn
    assert torch.equal(answers(model, *args), answer) and len(here) == 2
    ptq4dm.unfuse(model)
    assert torch.equal(answers(model, *args), before) and len(here) == 2
    assert not any(hasattr(one, mark) for one in model.modules() for mark in ("notes", "sharing", "widths"))


@pytest.mark.parametrize("kind", list(FORMATS))
def test_shared_inputs_are_quantized_once_with_the_same_bits(kind, here):
    """Without a norm between nothing is rounded in another way."""
    model, (x, scale, shift) = Net(Block(nn.Identity(), kind)), inputs()
    other = torch.randn(2, 3, K)
    before = answers(model, x, scale, shift), answers(model, x[:, :3], scale, shift, other)
    assert ptq4dm.fuse(model) == ["blocks.0.attn"] + (["blocks.0.attn.norm_q"])
    assert torch.equal(answers(model, x, scale, shift), before[0])
    assert here == [None]  # once for three layers
    here.clear()
    fresh = copy.deepcopy(model)
    for one in fresh.modules():
        vars(one).pop("sharing", None)
    assert torch.equal(answers(model, x[:, :3], scale, shift, other), before[1])


def test_cross_attention_shares_the_text_alone(here):
    model, (x, scale, shift) = Net(Block(nn.Identity())), inputs()
    other = torch.randn(2, 5, K)
    before = answers(model, x, scale, shift, other)
    report = ptq4dm.fuse(model)
    for _ in range(2):
        assert torch.equal(answers(model, x, scale, shift, other), before)
    assert here == [None, None, None]  # at the first call for the query too; then for key and value
    assert model.blocks[0].attn.sharing.settled() == (1,)
    assert "fused     1 Attend, its input quantized once" in str(report)


class Gated(nn.Module):
    """A feed-forward of this kind, its layers quantized; a norm before it."""

    def __init__(self, kind, act):
        super().__init__()
        torch.manual_seed(4)
        self.norm = nn.LayerNorm(K)
        if act == "flux2":
            self.ff = Flux2FeedForward(K, mult=2.0)
            names = ("linear_in", "linear_out")
        else:
            self.ff = FeedForward(K, mult=2, activation_fn=act)
            names = ("net.0.proj", "net.2")
        made, plan = FORMATS[kind]
        for name in names:
            linear = self.ff.get_submodule(name)
            layer = made(linear, plan())
            layer.pack(linear.weight.detach(), name)
            if linear.bias is not None:
                layer.put(bias=linear.bias)
            replace_module(self.ff, name, layer)

    def forward(self, x, scale, shift, other=None):
        return x + self.ff(self.norm(x))


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("act", ["geglu", "swiglu", "flux2"])
def test_gates_are_quantized_with_what_reads_them(act, kind, here):
    model, args = Net(Gated(kind, act)), inputs()
    before = answers(model, *args)
    report = ptq4dm.fuse(model)
    answer = answers(model, *args)
    assert here == ([None] * 2 if kind.startswith("static") else ["layer", "gate"])
    assert (answer - before).abs().max() < 3e-2 * before.abs().max()
    assert torch.equal(answers(model, *args), answer)
    assert "GLU, quantized with what reads it" in str(report)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (answers(compiled, *args) - answer).abs().max() < 1e-2 * answer.abs().max()
    torch._dynamo.reset()
    ptq4dm.unfuse(model)
    assert torch.equal(answers(model, *args), before)


def test_what_is_of_rows_is_computed(here):
    """A modulation for each token is nothing that the kernel takes over: the tensor is shared instead."""
    model, args = Net(Block(nn.LayerNorm(K), "int8", "tokens")), inputs()
    before = answers(model, *args)
    report = ptq4dm.fuse(model)
    assert torch.equal(answers(model, *args), before) and here == [None]
    assert torch.equal(answers(model, *args), before)
    assert "left      2 LayerNorm: no quantized layer reads it" in str(report)


def test_torch_sees_a_tensor():
    x, norm = torch.randn(2, 3, K), nn.LayerNorm(K)
    y = norm(x)
    value = Handed(x, (norm, norm.weight, norm.bias, norm.eps, "layer"))
    assert value.shape == y.shape and value.ndim == 3 and value.dtype == y.dtype and len(value) == 2
    for found, expected in (
        (value - 1, y - 1), (2 - value, 2 - y), (-value, -y), (value / 2, y / 2), (value**2, y**2),
        (value @ y.mT, y @ y.mT), (value[:, 1:], y[:, 1:]), (torch.cat([y, value], 1), torch.cat([y, y], 1)),
        (torch.stack([value, value]), torch.stack([y, y])), (F.gelu(value), F.gelu(y)), (value.mean(), y.mean()),
        (value.unflatten(-1, (4, -1)), y.unflatten(-1, (4, -1))), (y * value, y * y), (value + y, y + y),
        (value * 3, y * 3), (torch.where(y > 0, y, value), y), (F.linear(value, y[0]), F.linear(y, y[0])),
        (value.to(torch.bfloat16).tensor(), y.bfloat16()), (value.chunk(2, -1)[1], y.chunk(2, -1)[1]),
    ):  # fmt: skip
        assert torch.equal(found, expected)
    gain = torch.randn(2, 1, K)
    assert torch.equal((gain * value + gain).tensor(), gain * y + gain)
    assert not isinstance(value * torch.randn(2, 3, K), Handed)


@pytest.mark.parametrize("where", ["norm", "attn", "attn.to_k"])
def test_hooks_see_tensors(where, here):
    model, args = Net(Block(nn.LayerNorm(K))), inputs()
    before = answers(model, *args)
    ptq4dm.fuse(model)
    for already in (False, True):  # before anything is known, and after
        if already:
            answers(model, *args)
        seen = []
        handle = (
            model.blocks[0]
            .get_submodule(where)
            .register_forward_hook(lambda module, given, out, seen=seen: seen.append((type(given[0]), type(out))))
        )
        here.clear()
        assert torch.equal(answers(model, *args), before)
        assert seen == [(torch.Tensor, torch.Tensor)] and "layer" not in here
        handle.remove()
        answers(model, *args)
        assert here[-1] == "layer"


def test_where_it_computes_as_before(here):
    model, args = Net(Block(nn.LayerNorm(K))), inputs()
    ptq4dm.fuse(model)
    model.train()
    model.forward(*args)
    model.eval()
    assert here == []
    x = args[0].clone().requires_grad_()
    model.blocks[0].norm(x).sum().backward()  # gradients pass the norm itself
    assert x.grad is not None and here == []


def test_other_layers_in_between_are_given_tensors(here):
    model, args = Net(Block(nn.LayerNorm(K))), inputs()
    model.blocks[0].attn.to_v = model.blocks[0].attn.to_v.dequantized()
    before = answers(model, *args)
    ptq4dm.fuse(model)
    assert (answers(model, *args) - before).abs().max() < 2e-2 * before.abs().max() and here == ["layer"]


def test_compiled_whole(here):
    model, args = Net(*(Block(norm, "int8") for norm in norms().values())), inputs()
    ptq4dm.fuse(model)
    eager = answers(model, *args)
    torch._dynamo.reset()
    made = []

    def backend(graph, given):
        made.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, given)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(answers(compiled, *args), eager)
    assert sum("svdq_codes" in name for name in made) == len(model.blocks)
    torch._dynamo.reset()


@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_layers_that_share_static_codes_compile_whole(code, here):
    """Their keys hold a type, numbers and perhaps None: equal ones are the same, whichever objects they are."""
    zero = 3 if code == "int8" else None
    plan = LayerPlan(format=code, input_scale=0.05, input_zero_point=zero)
    layers = nn.ModuleList(quantized_copy(nn.Linear(K, K), plan, "x") for _ in range(2))
    x = torch.randn(2, 3, K)

    def both(value):
        handed = Handed(value)
        return [layer(handed) for layer in layers] + [torch.tensor(len(handed.made))]

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for one, other in zip(compiled(x), both(x), strict=True):
            assert torch.equal(one, other)
        assert both(x)[-1] == 1
    torch._dynamo.reset()
    assert same_key(("a", 1, None), ("a", 1, None)) and not same_key(("a",), layers[0])
    assert same_key(layers[0], layers[0]) and not same_key(*layers)


def test_the_op_says_what_does_not_fit():
    x, row = torch.randn(2, 3, K), torch.ones(1, K)

    def codes(scale, shift, form):
        return w4_codes.svdq_codes(x, None, None, None, "int8", 0.0, scale, shift, 1e-6, form)

    assert codes(row, None, "rms")[0].shape == (6, K)
    for scale, shift, form, match in (
        (row, None, "group", "one of adaptive, layer, rms"), (row, row, "adaptive", "2 samples"),
        (row, torch.ones(2, K), "layer", "2 samples"), (torch.ones(3, K), None, "rms", "2 samples"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            codes(scale, shift, form)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("device", range(max(1, torch.cuda.device_count())))
def test_on_a_gpu(device, kind):
    """Beside the unfused model, the same bits each time; compiled whole; in a CUDA graph; on any GPU there is."""
    place = torch.device("cuda", device)
    model = Net(*(Block(norm, kind) for norm in norms().values())).to(place, torch.bfloat16)
    args = [one.to(place, torch.bfloat16) for one in inputs(2, 70)]
    before = answers(model, *args).float()
    report = ptq4dm.fuse(model)
    answer = answers(model, *args)
    assert torch.equal(answers(model, *args), answer) and "quantized with what reads it" in str(report)
    assert (answer - before).norm() < 0.05 * before.norm()
    compiled = answers(torch.compile(model, fullgraph=True), *args)
    assert (compiled - answer).norm() < 0.05 * before.norm()
    torch._dynamo.reset()
    with torch.cuda.device(place), torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(*args)
        for _ in range(2):
            args[0].add_(1)  # what a graph is fed changes: codes are made anew in it
            graph.replay()
            assert torch.equal(output, model(*args))
