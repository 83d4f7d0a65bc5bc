"""Fused forward passes: the same answers, the same checkpoints, and no fusing where it does not apply."""

import contextlib

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import denoisers
import ptq4dm
from helpers import run
from ptq4dm import RTNConfig
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.fusing import fuse as FUSE

CUDA = torch.cuda.is_available()
NAMES = {
    "conv_norm_out",
    "down_blocks.0.resnets.0",
    "down_blocks.1.attentions.0",
    "down_blocks.1.resnets.0",
    "mid_block.attentions.0",
    "mid_block.resnets.0",
    "mid_block.resnets.1",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "up_blocks.0.resnets.0",
    "up_blocks.0.resnets.1",
    "up_blocks.0.upsamplers.0",
    "up_blocks.1.resnets.0",
    "up_blocks.1.resnets.1",
}


@pytest.fixture(scope="module")
def store(unet):
    pipe = DDPMPipeline(unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=4, num_inference_steps=3))


@pytest.fixture
def quantized(unet, store):
    def build(form="int8", **options):
        model = unet()
        ptq4dm.quantize(model, RTNConfig(format=form, **options), store if not options else None)
        return model

    return build


@pytest.fixture(autouse=True)
def no_cpu_kernels(monkeypatch):
    """As on a CPU without kernels for fused modules; test_fuse_cpu.py has them."""
    monkeypatch.setattr(FUSE.cpu, "kernels_for", lambda device: False)


@contextlib.contextmanager
def fused_here(monkeypatch, kernel=None):
    """Take this device for one that fused passes run on; kernel: the one to run there."""
    with monkeypatch.context() as patch:
        patch.setattr(FUSE.unet, "on_kernels", lambda _: True)
        if kernel:
            patch.setattr(w8a8, "kernel_name", lambda *_: kernel)
        yield


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_fused_answers_are_the_unfused_ones(form, quantized, unet, monkeypatch):
    exact, model = run(unet()), quantized(form)
    before, keys = run(model), list(model.state_dict())
    assert set(ptq4dm.fuse(model)) == NAMES and ptq4dm.fuse(model) == []
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model), before)  # on a CPU nothing changes
    with fused_here(monkeypatch, w8a8.REFERENCE):
        answer = run(model)
    assert (answer - before).norm() <= 0.2 * (before - exact).norm()  # codes on a tie may turn
    ptq4dm.unfuse(model)
    assert torch.equal(run(model), before)
    assert not any(type(m).__name__.startswith("Fused") for m in model.modules()) and type(model.conv_act) is nn.SiLU
    assert type(model.conv_norm_out) is nn.GroupNorm
    processors = {type(m.processor) for m in model.modules() if isinstance(m, Attention)}
    assert processors == {AttnProcessor2_0}


@pytest.mark.skipif(CUDA, reason="runs kernels in Triton's interpreter")
def test_fused_kernels_of_a_whole_model(quantized, unet, monkeypatch):
    exact, model = run(unet()), quantized()
    before = run(model)
    ptq4dm.fuse(model)
    with fused_here(monkeypatch, w8a8.TRITON):
        answer = run(model)
    assert (answer - before).norm() <= 0.2 * (before - exact).norm()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_fused_model_on_the_gpu(form, quantized, unet):
    """Against the unfused one; compiled whole; in a CUDA graph, the same bits every time."""
    exact = run(unet().cuda())
    model = quantized(form).cuda().to(memory_format=torch.channels_last)
    before = run(model)
    ptq4dm.fuse(model)
    answer = run(model)
    assert (answer - before).norm() <= 0.5 * (before - exact).norm()
    compiled = run(torch.compile(model, fullgraph=True))
    assert (compiled - answer).norm() <= 0.5 * (before - exact).norm()
    x, t = torch.randn(2, 3, 8, 8, device="cuda"), torch.full((2,), 10, device="cuda")
    with torch.no_grad():
        eager = model(x, t).sample.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(x, t).sample
    for _ in range(3):
        output.zero_()
        graph.replay()
        assert torch.equal(output, eager)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_fused_model_compiles_whole(form, quantized, monkeypatch):
    model = quantized(form)
    ptq4dm.fuse(model)
    with fused_here(monkeypatch, w8a8.REFERENCE):
        eager = run(model)
        torch._dynamo.reset()
        assert torch.equal(run(torch.compile(model, fullgraph=True, backend="aot_eager")), eager)
    torch._dynamo.reset()


def test_a_fused_model_saves_and_loads(quantized, tmp_path):
    model = quantized()
    before = run(model)
    ptq4dm.fuse(model)
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), before) and set(ptq4dm.fuse(loaded)) == NAMES


def test_layers_with_hooks_are_called(quantized, monkeypatch):
    """Adapters, offloading and recorders expect a layer's own forward pass."""
    model, seen = quantized(), []
    ptq4dm.fuse(model)
    block = model.mid_block.resnets[0]
    block.conv1.register_forward_hook(lambda *_: seen.append("conv1"))
    model.mid_block.attentions[0].to_q.register_forward_hook(lambda *_: seen.append("to_q"))
    block.norm1.register_forward_hook(lambda *_: seen.append("norm1"))
    with fused_here(monkeypatch, w8a8.REFERENCE):
        run(model)
    assert seen == ["norm1", "conv1", "to_q"]


def test_adapters_on_a_fused_model_are_called(quantized, monkeypatch):
    model = quantized()
    ptq4dm.fuse(model)
    with fused_here(monkeypatch, w8a8.REFERENCE):
        plain = run(model)
        model.mid_block.resnets[0].conv2 = denoisers.Doubled(model.mid_block.resnets[0].conv2)
        model.conv_out = denoisers.Doubled(model.conv_out)
        answer = run(model)
    ptq4dm.unfuse(model)
    assert (answer - run(model)).norm() <= 0.02 * answer.norm() and (answer - plain).norm() > 0.1 * plain.norm()


def test_what_does_not_fit_stays(unet, quantized):
    assert ptq4dm.fuse(unet()) == []  # nothing quantized
    report = ptq4dm.fuse(quantized(activations="dynamic"))  # scales not known beforehand
    assert set(report) == set(report.handed) == {name for name in NAMES if "attentions" in name}
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, temb_channels=None, groups=4, output_scale_factor=2.0)
    assert ptq4dm.fuse(block) == [] and not any(is_quantized(m) for m in block.modules())


# --- what it says -------------------------------------------------------------------------------------------


def test_it_says_what_it_fused(quantized):
    model = quantized()
    report = ptq4dm.fuse(model)
    assert isinstance(report, list) and set(report) == NAMES and set(report.kinds) == NAMES
    text = str(report)
    assert "fused     8 ResnetBlock2D" in text and "fused     4 Attention" in text
    assert CUDA or "on this device every module computes as before" in text
    again = ptq4dm.fuse(model)
    assert again == [] and "left      8 ResnetBlock2D: it is fused already" in str(again)
    model.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: None)
    FUSE.unfuse(model)
    assert "'mid_block.resnets.0': computes as before while hooks" in str(ptq4dm.fuse(model))


def test_it_says_what_it_left_and_why(quantized, unet):
    left = ptq4dm.fuse(unet()).left
    assert left["mid_block.resnets.0"] == ("ResnetBlock2D", "none of its layers is quantized")
    model = quantized(activations="dynamic", modules_to_not_convert=("mid_block.resnets.0.conv2", "up_blocks"))
    report = ptq4dm.fuse(model)
    assert (
        set(report) == set(report.handed)
        and "'conv1' has dynamic inputs" in report.left["down_blocks.0.resnets.0"][1]
    )
    assert "it has dynamic inputs" in report.left["conv_norm_out"][1]
    assert report.left["up_blocks.0.resnets.0"][1] == "none of its layers is quantized"
    assert "ResnetBlock2D" in str(report) and "('down_blocks.0.resnets.0')" in str(report)
    model = quantized()
    model.mid_block.resnets[0].conv2 = nn.Conv2d(*[model.mid_block.resnets[0].conv2.in_channels] * 2, 3, padding=1)
    model.mid_block.attentions[0].set_processor(AttnProcessor())
    left = ptq4dm.fuse(model).left
    assert left["mid_block.resnets.0"][1] == "'conv2' is in full precision"
    assert left["mid_block.attentions.0"] == ("Attention", "its processor is AttnProcessor")
    assert "no module is of a kind" in str(ptq4dm.fuse(nn.Sequential(nn.Linear(3, 3))))
