"""Fused modules on a CPU: the unfused answers but for rounding, and plain modules wherever fusing does not apply."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import denoisers
import models
import ptq4dm
from ptq4dm.calibration.record import replay
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.w4 import on_cpu
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.layers.fusing import cpu
from ptq4dm.layers.fusing.transformer import FusedInt8TransformerBlock

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {"unet": lambda: models.unet(mid_block_type=None), "dit": lambda: models.pixel_dit(num_layers=2)}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """oneDNN's products here, on a CPU without VNNI too, where they are right for the small sums of these models."""
    if not library.available():
        pytest.skip(f"no compiled kernels: {library.status()}")
    monkeypatch.setattr(w8a8, "kernel_name", lambda device, *_: w8a8.ONEDNN)


def inputs(model, batch=2):
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = {} if model.config.get("num_embeds_ada_norm") is None else {"class_labels": torch.arange(batch)}
    return {"x": x, "timestep": torch.full((batch,), 10)}, labels


@torch.no_grad()
def run(model, batch=2):
    given, labels = inputs(model, batch)
    return model(given["x"], given["timestep"], **labels, return_dict=False)[0]


@pytest.fixture(params=MODELS)
def pair(request):
    """(the float model, the same in W8A8 with static inputs)."""
    exact, model = MODELS[request.param]().eval(), MODELS[request.param]().eval()
    with ptq4dm.record(model) as calls:
        run(model, 4)
    ptq4dm.quantize(model, ptq4dm.PTQ4DMConfig(), calls)
    return exact, model


@pytest.fixture
def products(monkeypatch):
    """The dtypes of products of codes, as they are made."""
    made, plain = [], cpu.linear_of_codes

    def linear(*args):
        made.append(plain(*args))
        return made[-1]

    monkeypatch.setattr(cpu, "linear_of_codes", linear)
    return lambda: {one.dtype for one in made}


def test_answers_are_the_unfused_ones_but_for_rounding(pair, products):
    exact, model = pair
    before, keys = run(model), list(model.state_dict())
    error = (before - run(exact)).norm()
    for precision in ("float32", "bfloat16"):
        report = ptq4dm.fuse(model, precision)
        assert report and not report.left and not report.notes and list(model.state_dict()) == keys
        answer = run(model)
        assert getattr(torch, precision) in products()
        assert (answer - before).norm() <= (0.3 if precision == "float32" else 1.0) * error
        assert (answer - run(exact)).norm() <= 1.3 * error
        ptq4dm.unfuse(model)
        assert torch.equal(run(model), before)
        assert not any("between" in vars(module) for module in model.modules())


def test_the_kernels_run_and_nothing_else_is_silent(pair, monkeypatch):
    """Without the compiled kernels the same modules compute as before, and the report says so."""
    _, model = pair
    before = run(model)
    monkeypatch.setattr(library, "available", lambda: False)
    report = ptq4dm.fuse(model)
    assert torch.equal(run(model), before)
    assert not report or "on this device every module computes as before" in str(report)


def test_hooks_and_adapters_are_called(pair):
    _, model = pair
    ptq4dm.fuse(model)
    fused = next(m for m in model.modules() if type(m) in (FusedInt8TransformerBlock,) or hasattr(m, "conv2"))
    layer, name = (fused.conv2, "conv2") if hasattr(fused, "conv2") else (fused.attn1.to_q, "to_q")
    seen = []
    handle = layer.register_forward_hook(lambda *_: seen.append(name))
    plain = run(model)
    assert seen == [name]
    handle.remove()
    owner = fused if name == "conv2" else fused.attn1
    setattr(owner, name, denoisers.Doubled(layer))
    assert (run(model) - plain).norm() > 1e-3 * plain.norm()


def test_blocks_of_other_kinds_are_left(pair):
    _, model = pair
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and hasattr(module, "plan"):
            assert cpu.grid_of(module)[2] == 8
    x = torch.randn(2, 8, 4, 4)
    assert not cpu.runs_fused(x.double()) and not cpu.runs_fused(x[:0])
    assert not cpu.runs_fused(x.requires_grad_()) and not cpu.runs_fused(x.detach(), nn.Linear(8, 8))
    assert cpu.runs_fused(x.detach())


def test_optimize_fuses_and_says_in_what_precision(pair):
    _, model = pair
    before = run(model)
    report = ptq4dm.optimize(model, precision="bfloat16")
    said = str(report)
    assert "between the products of fused modules values are in bfloat16" in said and "blocks: left" in said
    assert all(m.between == torch.bfloat16 for m in model.modules() if "between" in vars(m))
    report.undo()
    assert torch.equal(run(model), before)
    chosen = "bfloat16" if cpu.has_bfloat16() else "float32"
    report = ptq4dm.optimize(model)
    assert f"values are in {chosen}" in str(report)
    report.undo()


def test_the_compiler_sees_the_plain_modules(pair):
    """torch.compile cannot see into the kernels: a fused model that it takes computes as it did before."""
    _, model = pair
    before = run(model)
    ptq4dm.fuse(model)
    torch._dynamo.reset()
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend="eager")), before)
    torch._dynamo.reset()


def test_what_has_no_kernels_on_a_cpu_is_not_fused_there(monkeypatch):
    monkeypatch.setattr(library, "available", lambda: False)
    model = denoisers.quantized("dit")[0]  # SVDQuant
    kinds = [type(module) for module in model.modules()]
    report = ptq4dm.optimize(model, compiled=False)
    assert [type(module) for module in model.modules()] == kinds and "fused" not in str(report)
    report.undo()


@torch.no_grad()
def test_four_bits_are_fused_on_a_cpu(monkeypatch):
    """Query, key and value share one input's codes; nothing but the order of float32 sums is another."""
    made, store, _ = denoisers.quantized("dit")
    model = copy.deepcopy(made)
    before, seen = replay(model, store.calls), []
    for name in ("input_codes", "product", "gelu_tanh_"):
        plain = getattr(on_cpu, name)
        monkeypatch.setattr(on_cpu, name, lambda *a, n=name, f=plain: seen.append(n) or f(*a))
    replay(model, store.calls)
    unfused = Counter(seen)
    report = ptq4dm.optimize(model, compiled=False, precision="bfloat16")
    assert "hand on codes and float32 alone" in str(report) and "2 BasicTransformerBlock" in str(report)
    seen.clear()
    after = replay(model, store.calls)
    fused = Counter(seen)
    assert fused["product"] == unfused["product"] > 0 == unfused["gelu_tanh_"] < fused["gelu_tanh_"]
    assert fused["input_codes"] < 0.7 * unfused["input_codes"]
    report.undo()
    assert torch.equal(replay(model, store.calls), before)
    model.dequantize()
    assert 0 < (after - before).norm() < 0.3 * (replay(model, store.calls) - before).norm()
