"""Fused blocks around layers whose inputs are quantized by rows in the call, of 8 bits and progressive ones.

The same answers, in fewer codes, and unfused elsewhere.
"""

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn

import denoisers
import ptq4dm
from fused_models import NAMES, adapters_are_called, compiled_whole, cost, fused_here
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.store import CalibrationStore, fingerprint
from ptq4dm.handed.value import RowCodes
from ptq4dm.kernels.w4 import from_codes as w4_codes
from ptq4dm.kernels.w4 import from_tokens
from ptq4dm.kernels.w8a8 import from_codes as w8a8_codes
from ptq4dm.layers.base import replace_module
from ptq4dm.layers.fusing import blocks, parts
from ptq4dm.layers.plan import LayerPlan
from ptq4dm.layers.progressive import ProgressiveLinear, ProgressivePlan
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.rotated.choices import ROTATED
from ptq4dm.layers.w8a8 import Fp8Linear, Int8Linear
from ptq4dm.svdquant.layers.svdq import SVDQLinear

CUDA = torch.cuda.is_available()
OPS = [(w4_codes, "svdq_codes"), (w8a8_codes, "w8a8_product"), (from_tokens, "progressive_product")]
PRODUCT = {"int8": "w8a8_product", "fp8": "w8a8_product"}
PRODUCT |= dict.fromkeys(("progressive", "turned"), "progressive_product")
PLANS = {
    "int8": LayerPlan(objective="max"),
    "fp8": LayerPlan(format="fp8", objective="max"),
    "progressive": ProgressivePlan(objective="max", group_size=32),
    "turned": ProgressivePlan(objective="max", group_size=32, rotation=32),
}
CASES = [
    ("flux", "int8", False), ("flux", "fp8", True), ("flux", "progressive", True), ("dit", "int8", False),
    ("dit", "fp8", False), ("dit", "progressive", False), ("flux", "turned", True),
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(kind, form, qkv=False, **options):
    model, store = denoisers.pair(kind)
    if qkv:
        model.fuse_qkv_projections()
        store = CalibrationStore({}, fingerprint(model), 1000, store.calls)
    if form == "progressive":
        plain = dict(rounding="nearest", smoothing="none", reorder=False, rotation="none")
        config = ptq4dm.QoQConfig(group_size=32, **plain, **options)
    elif form == "turned":
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and "blocks." in name:
                replace_module(model, name, quantized_copy(layer, PLANS[form], name))
        return model, store.calls
    else:
        config = ptq4dm.RTNConfig(activations="dynamic", format=form, **options)
    ptq4dm.quantize(model, config)
    return model, store.calls


@pytest.mark.parametrize("kind, form, qkv", CASES, ids=str)
def test_fused_answers_are_the_unfused_ones(kind, form, qkv, monkeypatch):
    model, calls = quantized(kind, form, qkv)
    exact, before = replay(denoisers.pair(kind)[0], calls), replay(model, calls)
    report = ptq4dm.fuse(model)
    assert set(report) - set(report.handed) == NAMES[kind]
    assert torch.equal(replay(model, calls), before)  # where no kernels are nothing changes
    with fused_here(monkeypatch, OPS) as seen:
        answer = replay(model, calls)
    layers = 1 if qkv else 3
    normed, plain, products = {
        "flux": (4 + 1 + 1, 4, 2 * layers + 2 + 4 + layers + 2),  # (attention | MLP) is no norm, but in the same op
        "dit": (2 * 2, 2, 2 * (3 + 1 + 1)),
    }[kind]
    assert seen.count("svdq_codes") == normed + (form == "turned")  # on a CPU such layers share no codes
    assert seen.count(PRODUCT[form]) >= products - plain and cost(answer, before, exact) < 0.05
    ptq4dm.unfuse(model)
    with fused_here(monkeypatch, OPS) as seen:
        assert torch.equal(replay(model, calls), before) and "svdq_codes" not in seen
    assert not any(type(module) in blocks.KINDS.values() for module in model.modules())


@pytest.mark.parametrize("function", ["", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("form", PLANS)
def test_a_layer_of_codes_is_the_layer(form, function):
    """Of a tensor, of codes, and of two tensors side by side; the function after it is that of torch."""
    torch.manual_seed(0)
    layer = quantized_copy(nn.Linear(128, 40), PLANS[form], "x")
    x = torch.randn(2, 7, 128)
    plain = layer(x)
    for same in (layer(layer.input_codes(x)), layer.multiply(x)):
        assert torch.allclose(same, plain, atol=1e-6)
    right = {
        "": lambda y: y,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda y: nn.functional.gelu(y, approximate="tanh"),
        "silu": nn.functional.silu,
    }[function](plain)
    assert torch.allclose(layer.multiply(x, function), right, atol=1e-6)
    both = layer.input_codes(x[..., :64], x[..., 64:])
    assert isinstance(both, RowCodes) and both.ndim == 3 and both.shape == (2, 7, 128)
    near = layer.multiply(both, function)
    assert (near - right).norm() < 2e-3 * right.norm()
    with pytest.raises(ValueError, match="the nonlinearity after a product is one of '', 'gelu'"):
        layer.multiply(x, "relu")


def test_what_does_not_fit_stays_and_says_why():
    model, _ = quantized("dit", "int8")
    attn = model.transformer_blocks[0].attn1
    attn.to_v = nn.Linear(attn.to_v.in_features, attn.to_v.out_features)
    report = ptq4dm.fuse(model)
    assert set(report) - set(report.handed) == NAMES["dit"] - {"transformer_blocks.0"}
    assert "'attn1.to_v' is in full precision" in str(report)
    static = quantized_copy(nn.Linear(64, 64), LayerPlan(objective="max", input_scale=0.1, input_zero_point=0), "x")
    gelu = GELU(64, 64)
    gelu.proj = static
    report = ptq4dm.fuse(nn.ModuleDict({"gelu": gelu}))
    assert report == [] and "static inputs, whose codes torch.compile makes" in str(report)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"rotation": 8}, "turns its inputs in blocks of 8, which no kernel does"),
        ({"input_scale": 0.1, "input_zero_point": 0}, "has static inputs"),
        ({"activation_bits": 6}, "has inputs of other than 8 bits"),
    ],
)
def test_progressive_layers_that_blocks_are_not_fused_around(options, why):
    gelu = GELU(64, 64)
    gelu.proj = quantized_copy(nn.Linear(64, 64), ProgressivePlan(objective="max", group_size=32, **options), "x")
    report = ptq4dm.fuse(nn.ModuleDict({"gelu": gelu}))
    assert report == [] and why in str(report) and gelu.proj.codes_key() is None


@pytest.mark.parametrize(
    "kind", [Int8Linear, Fp8Linear, ProgressiveLinear, SVDQLinear], ids=lambda kind: kind.__name__
)
def test_classes_derived_from_a_layer_are_not_taken_for_it(kind):
    """Rotated and split layers inherit from it, and compute otherwise: each class says for itself what it is."""

    def below(one):
        return [found for sub in one.__subclasses__() for found in (sub, *below(sub))]

    assert vars(kind)["in_blocks"] and (kind is SVDQLinear or below(kind))
    assert not [one.__name__ for one in below(kind) if parts.in_blocks(object.__new__(one))]
    plan = ROTATED[LayerPlan](LayerPlan(objective="max"), 64, "regular")
    rotated = quantized_copy(nn.Linear(64, 64), plan, "layer")
    gelu = GELU(64, 64)
    gelu.proj = rotated
    report = ptq4dm.fuse(nn.ModuleDict({"gelu": gelu}))
    assert report == [] and "which has no fused kernels here" in str(report)


def test_what_no_kernel_serves_is_told(monkeypatch):
    """Blocks of a CPU with kernels for SVDQuant, of which a layer is W8A8 and waits for a GPU: fused, and idle."""
    model, store = denoisers.pair("dit")
    recipe = ptq4dm.SVDQuantConfig(
        rank=8, num_tuples=2, smoothing=0.5, rounding="nearest", refinements=0, activations="int8"
    )
    ptq4dm.quantize(model, recipe, store)
    attn = quantized("dit", "int8")[0].transformer_blocks[0].attn1
    for name in ("to_q", "to_k", "to_v"):
        setattr(model.transformer_blocks[0].attn1, name, getattr(attn, name))
    monkeypatch.setattr(SVDQLinear, "has_block_kernels", lambda layer: True)
    text = str(ptq4dm.fuse(model))
    assert "fused     1 BasicTransformerBlock" in text and "fused     2 GELU" in text
    assert "as before 1 BasicTransformerBlock: no kernels of this device serve it" in text


def test_why_a_block_is_left_is_of_layers_that_it_reads():
    """Not of others in it; and where they would do, that they share no codes."""
    model, _ = quantized("dit", "int8")
    block = model.transformer_blocks[0]
    plan = LayerPlan(objective="max", activation_bits=6)
    embedder = block.norm1.emb.timestep_embedder
    embedder.linear_1 = quantized_copy(nn.Linear(embedder.linear_1.in_features, 64), plan, "x")
    width = block.attn1.to_q.in_features
    block.attn1.to_q = quantized_copy(nn.Linear(width, width), LayerPlan(format="fp8", objective="max"), "x")
    report = ptq4dm.fuse(model)
    assert report.left["transformer_blocks.0"][1] == "its query, key and value do not share codes"


def test_adapters_and_hooks_are_called(monkeypatch):
    model, calls = quantized("dit", "int8")
    adapters_are_called(model, calls, monkeypatch, OPS)


@pytest.mark.parametrize("kind, form", [("flux", "int8"), ("dit", "int8"), ("flux", "progressive")])
def test_a_fused_model_compiles_whole(kind, form, monkeypatch):
    model, calls = quantized(kind, form)
    ptq4dm.fuse(model)
    eager, answer, seen = compiled_whole(kind, model, calls, monkeypatch)
    assert torch.equal(answer, eager)
    assert any("svdq_codes" in name for name in seen) and any(PRODUCT[form] in name for name in seen)


@pytest.mark.parametrize("form", PLANS)
def test_a_fused_model_compiles_where_no_kernels_are(form):
    """Whether there are any is asked in the forward pass: of nothing that the compiler cannot see into."""
    model, calls = quantized("flux", form, qkv=form == "turned")
    before = replay(model, calls)
    ptq4dm.fuse(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.allclose(replay(model, calls), before, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind, form, qkv", CASES, ids=str)
def test_fused_models_on_the_gpu(kind, form, qkv):
    """Against the unfused one; the same bits every time; compiled whole."""
    model, calls = quantized(kind, form, qkv)
    exact = replay(denoisers.pair(kind)[0].cuda().bfloat16(), calls).float().cpu()
    nn.Module.bfloat16(model.cuda())
    before = replay(model, calls).float().cpu()
    report = ptq4dm.fuse(model)
    assert set(report) - set(report.handed) == NAMES[kind]
    answer = replay(model, calls)
    assert torch.equal(replay(model, calls), answer)
    assert cost(answer.float().cpu(), before, exact) < 0.7  # rounded to bf16 after the norm, or not
    (model.compile_repeated_blocks if kind == "flux" else model.compile)(fullgraph=True)
    assert cost(replay(model, calls).float().cpu(), answer.float().cpu(), exact) < 0.7
