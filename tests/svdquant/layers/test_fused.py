"""Fused forward passes of transformers with SVDQuant layers: the same answers, unfused where it does not apply."""

import copy

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn

import denoisers
import ptq4dm
from fused_models import DOUBLE, NAMES, SINGLE, adapters_are_called, compiled_whole, cost, fused_here, take_for_served
from ptq4dm import SVDQuantConfig
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.store import CalibrationStore, fingerprint
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.w4 import from_codes as svdq_codes
from ptq4dm.kernels.w4 import layer as svdq_linear
from ptq4dm.layers.fusing import blocks as FUSE
from ptq4dm.svdquant.layers.svdq import Codes, SVDQLinear
from ptq4dm.svdquant.lora import stack

CUDA = torch.cuda.is_available()
QUICK = {"rank": 8, "num_tuples": 2, "smoothing": 0.5, "rounding": "nearest", "refinements": 0}
OPS = [(svdq_codes, "svdq_codes"), (svdq_codes, "svdq_product")]
pytestmark = pytest.mark.usefixtures("one_thread")
BY_ACTIVATION = {"int8": svdq_linear.INT8, "none": svdq_linear.WEIGHT_ONLY}
_made = {}


@pytest.fixture
def quantized():
    """Builds (a fresh quantized model, its calls)."""

    def build(kind, qkv=False, **options):
        key = (kind, qkv, str(options))
        if key not in _made:
            model, store = denoisers.pair(kind)
            if qkv:
                model.fuse_qkv_projections()
                store = CalibrationStore({}, fingerprint(model), 1000, store.calls)
            ptq4dm.quantize(model, SVDQuantConfig(**QUICK | options), store)
            _made[key] = model, store.calls
        model, calls = _made[key]
        return copy.deepcopy(model), calls

    return build


CASES = [("flux", "fp8", False), ("flux", "int8", True), ("flux", "int4", False), ("dit", "fp8", False)]


@pytest.mark.parametrize("kind, form, qkv", CASES, ids=str)
def test_fused_answers_are_the_unfused_ones(kind, form, qkv, quantized, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: False)
    model, calls = quantized(kind, qkv, activations=form)
    exact, before, keys = (
        replay(denoisers.pair(kind)[0], calls),
        replay(model, calls),
        list(model.state_dict()),
    )
    assert set(ptq4dm.fuse(model)) == NAMES[kind] and ptq4dm.fuse(model) == []
    assert list(model.state_dict()) == keys
    assert torch.equal(replay(model, calls), before)  # where nothing is compiled nothing changes
    with fused_here(monkeypatch, OPS) as seen:
        answer = replay(model, calls)
    layers = 1 if qkv else 3
    codes, products = {"flux": (4 + 2, 2 * layers + 2 + layers + 2), "dit": (2 * 2, 2 * (3 + 1))}[kind]
    assert (seen.count("svdq_codes"), seen.count("svdq_product")) == (codes, products)
    # 32-bit sums in another order: where they turn a code, by one step; in 4 bits that is seen
    assert cost(answer, before, exact) < (0.05 if form == "int4" else 0.01)
    ptq4dm.unfuse(model)
    with fused_here(monkeypatch, OPS) as seen:
        assert torch.equal(replay(model, calls), before) and not seen
    assert not any(type(module) in FUSE.KINDS.values() for module in model.modules())


def test_layers_of_their_own_smoothing_get_their_own_codes(quantized, monkeypatch):
    """As in Nunchaku's checkpoints: the MLP of a single block shares nothing with query, key and value."""
    model, calls = quantized("flux", activations="int8")
    block = model.get_submodule(SINGLE)
    query, mlp = block.attn.to_q, block.proj_mlp
    query.down, query._lender = mlp.down, ()
    for layer in (block.attn.to_k, block.attn.to_v):
        layer._lender = (query,)
    before = replay(model, calls)
    ptq4dm.fuse(model)
    with fused_here(monkeypatch, OPS) as seen:
        answer = replay(model, calls)
    assert seen.count("svdq_codes") == 4 + 3
    assert (answer - before).norm() < 1e-3 * before.norm()
    block.attn.to_k._lender = (mlp,)  # no two of these share
    ptq4dm.unfuse(model)
    report = ptq4dm.fuse(model)
    assert set(report) - set(report.handed) == NAMES["flux"] - {SINGLE}
    assert set(report.handed) == {f"{SINGLE}.norm.norm", f"{SINGLE}.attn"}


@pytest.mark.parametrize("kind, form", [("flux", "fp8"), ("dit", "int4")])
def test_a_fused_model_compiles_whole(kind, form, quantized, monkeypatch):
    model, calls = quantized(kind, activations=form)
    ptq4dm.fuse(model)
    eager, answer, seen = compiled_whole(kind, model, calls, monkeypatch)
    assert torch.equal(answer, eager)
    assert any("svdq_codes" in name for name in seen) and any("svdq_product" in name for name in seen)


@pytest.mark.parametrize("where", ["norm1", "attn", "ff", "ff.net.0.proj", "attn.to_q"])
def test_modules_with_hooks_are_called(where, quantized, monkeypatch):
    """Recorders and offloading expect a module's own forward pass, of tensors."""
    model, calls = quantized("flux", activations="int8")
    ptq4dm.fuse(model)
    seen, block = [], model.get_submodule(DOUBLE)

    def hook(module, args, kwargs, output):
        inputs = [*args, *kwargs.values()]
        seen.append(any(isinstance(x, torch.Tensor) for x in inputs) and not any(_codes(x) for x in inputs))

    block.get_submodule(where).register_forward_hook(hook, with_kwargs=True)
    with fused_here(monkeypatch, OPS) as ops:
        replay(model, calls)
    assert seen and all(seen)
    assert ops.count("svdq_codes") == 2  # the single block is fused


def _codes(x):
    return isinstance(x, Codes)


def test_adapters_on_a_fused_model_are_called(quantized, monkeypatch):
    model, calls = quantized("dit", activations="int8")
    adapters_are_called(model, calls, monkeypatch, OPS)


def test_fused_lora_adapters(quantized, monkeypatch):
    """They are ranks of their own layer's branch: it shares no codes then."""
    model, calls = quantized("flux", activations="int8")
    ptq4dm.fuse(model)
    plain = replay(model, calls)
    torch.manual_seed(0)
    for name in ("attn.to_v", "proj_out"):
        layer = model.get_submodule(f"{SINGLE}.{name}")
        down = torch.randn(4, layer.in_features) / layer.in_features**0.5
        stack(layer, {"style": (down, torch.randn(layer.out_features, 4), 1.0)})
    before = replay(model, calls)
    assert (before - plain).norm() > 0.1 * plain.norm()
    with fused_here(monkeypatch, OPS) as seen:
        answer = replay(model, calls)
    assert seen.count("svdq_codes") == 4  # those of the double block
    assert (answer - before).norm() < 1e-3 * before.norm()
    stack(model.get_submodule(f"{SINGLE}.attn.to_v"), {})
    with fused_here(monkeypatch, OPS) as seen:
        answer = replay(model, calls)
    assert seen.count("svdq_codes") == 6
    assert (answer - replay(model, calls)).norm() < 1e-3 * before.norm()


def test_training_is_unfused(quantized, monkeypatch):
    model, calls = quantized("dit", activations="int8")
    ptq4dm.fuse(model)
    for module in model.modules():
        if type(module) in FUSE.KINDS.values():
            module.training = True
    with fused_here(monkeypatch, OPS) as seen:
        replay(model, calls)
    assert seen == []


def test_what_does_not_fit_stays(quantized):
    assert ptq4dm.fuse(denoisers.pair("flux")[0]) == []  # nothing quantized
    model, _ = quantized("dit", activations="int4", group_size=32)
    report = ptq4dm.fuse(model)
    assert all(name.endswith("net.0") for name in report if name not in report.handed)
    model, _ = quantized("dit", roles={"*to_v": "keep"}, activations="int8")
    report = ptq4dm.fuse(model)
    assert all(name.endswith("net.0") for name in report if name not in report.handed)
    gelu = GELU(64, 64, approximate="none")
    assert ptq4dm.fuse(nn.ModuleList([gelu])) == [] and not isinstance(gelu.proj, SVDQLinear)


@pytest.mark.skipif(CUDA, reason="runs kernels in Triton's interpreter, which multiplies fp16 but no bf16")
@pytest.mark.parametrize("kind", ["flux", "dit"])
def test_fused_kernels_of_a_whole_model(kind, quantized, monkeypatch):
    pytest.importorskip("triton")
    model, calls = quantized(kind, activations="int8")
    calls = calls[:1]
    nn.Module.half(model)  # diffusers forbids model.half() of quantized ones
    ptq4dm.fuse(model)
    with monkeypatch.context() as patch:
        take_for_served(patch)
        reference = replay(model, calls).float()
        for module in (svdq_codes, svdq_linear):
            patch.setattr(module, "known_name", lambda device, activation, _: BY_ACTIVATION[activation])
        answer = replay(model, calls).float()
    assert not torch.equal(answer, reference) and (answer - reference).norm() < 0.01 * reference.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind, form, qkv", CASES, ids=str)
def test_fused_models_on_the_gpu(kind, form, qkv, quantized):
    """Against the unfused one; the same bits every time; compiled whole."""
    model, calls = quantized(kind, qkv, activations=form)
    exact = replay(denoisers.pair(kind)[0].cuda().bfloat16(), calls).float().cpu()  # times are rounded there, too
    nn.Module.bfloat16(model.cuda())
    before = replay(model, calls).float().cpu()
    ptq4dm.fuse(model)
    answer = replay(model, calls)
    assert torch.equal(replay(model, calls), answer)
    assert (
        cost(answer.float().cpu(), before, exact) < 0.5
    )  # rounded to bf16 after the norm, or not: 0.05 (int8) to 0.3 (int4)
    (model.compile_repeated_blocks if kind == "flux" else model.compile)(fullgraph=True)
    assert cost(replay(model, calls).float().cpu(), answer.float().cpu(), exact) < 0.5
