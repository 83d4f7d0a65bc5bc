"""The verb: what it does and says, and that all of it can be taken back."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import models
import ptq4dm
from helpers import same
from ptq4dm.inference import blocks, steps
from ptq4dm.inference import optimize as verb
from ptq4dm.inference.graphs import Graphed
from traced_graphs import TracedGraphs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the CPU, and blocks that torch.compile traces and does not compile."""
    monkeypatch.setattr(steps, "has_graphs", lambda device: True)
    monkeypatch.setattr(steps, "backend", TracedGraphs)
    compiled = torch.compile
    monkeypatch.setattr(blocks.torch, "compile", lambda call, **more: compiled(call, backend="eager", **more))


def pipeline():
    from diffusers import DDIMScheduler

    pipe = ptq4dm.PixelDiTPipeline(models.pixel_dit(num_layers=2), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, seeds=(0, 1), steps=3):
    return ptq4dm.sample(pipe, seeds, num_inference_steps=steps)


def parts(model):
    """Attributes of all modules, but for what they hold, by identity."""
    return [
        (name, key, id(value))
        for name, one in model.named_modules()
        for key, value in vars(one).items()
        if key != verb.MARK
    ]  # fmt: skip


def test_three_lines_of_a_user(graphs):
    pipe = pipeline()
    expected, before = images(pipe), parts(pipe.transformer)
    report = ptq4dm.optimize(pipe, compiled=False)
    for _ in range(2):
        assert torch.allclose(images(pipe), expected, atol=1e-5)
    graphed = pipe.transformer.forward
    assert isinstance(graphed, Graphed) and graphed.captures == 1 and graphed.replays == 5
    said = str(report)
    assert "transformer, DiTTransformer2DModel on cpu" in said
    assert "1 now, 1 captured, 0 dropped, 5 calls replayed" in said and "1 calls as they are: the first call" in said
    ptq4dm.unoptimize(pipe)
    assert parts(pipe.transformer) == before and not graphed.graphs
    ptq4dm.unoptimize(pipe)


def test_blocks_compiled_and_graphs_of_them(graphs):
    pipe = pipeline()
    expected = images(pipe)
    report = ptq4dm.optimize(pipe, compiled=True)
    assert torch.allclose(images(pipe), expected, atol=1e-5)
    assert "blocks compiled by torch.compile when they are first called: 2 BasicTransformerBlock" in str(report)
    assert pipe.transformer.forward.replays == 2
    report.undo()
    assert all(one._compiled_call_impl is None for one in pipe.transformer.modules())


def test_on_a_cpu_the_blocks_of_transformers_are_compiled(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(blocks.torch, "compile", lambda call, **more: compiled(call, backend="eager", **more))
    monkeypatch.setattr(blocks, "get_cpp_compiler", lambda: "c++")
    pipe = pipeline()
    expected = images(pipe)
    said = str(ptq4dm.optimize(pipe))
    assert "2 BasicTransformerBlock" in said and "graphs: left, for there are none on cpu" in said
    assert torch.allclose(images(pipe), expected, atol=1e-5) and "forward" not in vars(pipe.transformer)
    ptq4dm.unoptimize(pipe)


def test_on_a_cpu_unets_are_left_and_what_has_no_compiler(monkeypatch):
    model = models.conditional_unet()
    before = parts(model)
    assert "blocks: left, for that made a UNet's step hardly faster" in str(ptq4dm.optimize(model))
    assert parts(model) == before

    def none():
        raise RuntimeError

    monkeypatch.setattr(blocks, "get_cpp_compiler", none)
    assert "finds no C++ compiler (RuntimeError)" in str(ptq4dm.optimize(models.dit()))


def test_again_is_anew(graphs):
    pipe = pipeline()
    before = parts(pipe.transformer)
    ptq4dm.optimize(pipe, compiled=True)
    first = pipe.transformer.forward
    ptq4dm.optimize(pipe, compiled=False, kept=2)
    assert pipe.transformer.forward is not first and pipe.transformer.forward.kept == 2
    assert all(one._compiled_call_impl is None for one in pipe.transformer.modules())
    ptq4dm.unoptimize(pipe)
    assert parts(pipe.transformer) == before


def test_a_model_by_itself_and_a_copy_of_one(graphs):
    model = models.unet()
    ptq4dm.optimize(model)
    copied = copy.deepcopy(model)
    assert isinstance(model.forward, Graphed) and not isinstance(copied.forward, Graphed)
    report = ptq4dm.optimize(copied)
    assert isinstance(copied.forward, Graphed) and "graphs: left" not in str(report)
    ptq4dm.unoptimize(copied)
    assert "forward" not in vars(copied)


def test_an_optimized_model_that_nobody_holds_is_freed():
    model = models.unet()
    ptq4dm.optimize(model, fused=False, compiled=False)
    ptq4dm.optimize(model)  # anew
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_pickled_model_is_not_optimized():
    model = models.plain_unet()
    ptq4dm.optimize(model, compiled=False)
    again = pickle.loads(pickle.dumps(model))
    ptq4dm.unoptimize(again)
    assert same(again, model)


def test_saved_while_optimized(graphs, tmp_path):
    pipe = pipeline()
    expected = images(pipe)
    ptq4dm.optimize(pipe, compiled=True)
    images(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = ptq4dm.load_pipeline(str(tmp_path / "saved"))
    assert torch.equal(images(again), expected)


def test_quantized_and_optimized(graphs):
    pipe = pipeline()
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    expected = images(pipe)
    ptq4dm.optimize(pipe, compiled=False)
    assert torch.allclose(images(pipe), expected, atol=1e-4) and pipe.transformer.forward.replays


def test_calibration_sees_the_layers_of_an_optimized_pipeline(graphs):
    """Recorders are hooks: while they are there, nothing comes from a graph or from compiled code."""
    config = ptq4dm.CalibrationConfig(num_samples=4, num_inference_steps=3)
    plain = ptq4dm.collect(pipeline(), config)
    pipe = pipeline()
    ptq4dm.optimize(pipe, compiled=True)
    images(pipe)
    store = ptq4dm.collect(pipe, config)
    assert torch.equal(store.statistics.counts, plain.statistics.counts) and store.statistics.counts.sum() > 0
    images(pipe)
    assert pipe.transformer.forward.replays > 2


@pytest.mark.parametrize("graphs_too", [False, True])
def test_a_unet_is_compiled_as_a_whole(graphs, graphs_too):
    model, seen = models.plain_unet(mid_block_type=None), []
    before = parts(model)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x, 5).sample
        report = ptq4dm.optimize(model, compiled=True, graphs=graphs_too)
        assert "compiled as a whole" in str(report)
        for _ in range(3):
            assert torch.allclose(model(x, 5).sample, expected, atol=1e-5)
        handle = model.conv_out.register_forward_hook(lambda *_: seen.append(1))
        for count in (1, 2):
            assert torch.allclose(model(x, 5).sample, expected, atol=1e-5) and len(seen) == count
        handle.remove()
        copied = copy.deepcopy(model)
        assert torch.allclose(copied(x, 5).sample, expected, atol=1e-6)
        assert copied.forward == blocks.plain_forward(copied)
    report.undo()
    assert parts(model) == before


class Scaled(nn.Module):
    """y = n x; n is a constant to torch.compile."""

    def __init__(self, n):
        super().__init__()
        self.name = "n" * n

    def forward(self, x):
        return x * len(self.name)


@torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8)
def test_blocks_that_all_differ_are_all_compiled():
    """torch.compile gives a function up after 8 times, and blocks of a class are one function."""
    found, compiled, x = [Scaled(n) for n in range(1, 13)], [], torch.ones(2)

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    blocks.compile_blocks(found, backend=backend)
    for _ in range(2):
        assert [block(x)[0].item() for block in found] == list(range(1, 13))
    assert len(compiled) == 12


def test_hooks_in_compiled_blocks():
    model, seen = models.pixel_dit(num_layers=2), []
    found = blocks.repeated_blocks(model)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = model(x, t, class_labels=labels).sample
        blocks.compile_blocks(found, backend="eager")
        assert torch.allclose(model(x, t, class_labels=labels).sample, expected, atol=1e-6)
        layer = found[1].attn1.to_q
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        for count in (1, 2):
            assert torch.allclose(model(x, t, class_labels=labels).sample, expected, atol=1e-6)
            assert len(seen) == count
        handle.remove()
        found[1].attn1.to_q = nn.Sequential(layer)  # as an adapter does
        layer.register_forward_hook(lambda *_: seen.append(1))
        assert torch.allclose(model(x, t, class_labels=labels).sample, expected, atol=1e-6)
    assert len(seen) == 3
    blocks.uncompile_blocks(found)


@pytest.mark.parametrize(
    ("build", "kind", "count"),
    [
        (models.dit, "BasicTransformerBlock", 2),
        (models.conditional_unet, "BasicTransformerBlock", 4),
    ],
)
def test_the_blocks_that_are_repeated(build, kind, count):
    found = blocks.repeated_blocks(build())
    kinds = [type(one).__name__ for one in found]
    assert kinds.count(kind) == count
    ids = {id(part) for one in found for part in one.modules() if part is not one}
    assert not ids & {id(one) for one in found}


def test_a_model_without_repeated_blocks_says_so(graphs):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, timestep):
            return self.layer(x)

    model = Small().eval()
    report = ptq4dm.optimize(model, compiled=True)
    assert "blocks: left, for no class of blocks is repeated" in str(report)
    x = torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(model(x, 1), model.layer(x))
    assert model.forward.replays == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(graphs=True), "graphs are CUDA's"),
        (dict(fused=1), "fused is True, False or None"),
        (dict(kept=0), "kept is a whole number from 1 on"),
        (dict(kept=True), "kept is a whole number"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(ptq4dm.UserError, match=said):
        ptq4dm.optimize(pipeline(), **arguments)


def test_wrong_targets():
    with pytest.raises(ptq4dm.UserError, match="is a name"):
        ptq4dm.optimize("unet-cifar10")
    with pytest.raises(ptq4dm.UserError, match="compiled as a whole"):
        ptq4dm.optimize(torch.compile(models.unet(), backend="eager"))


def test_what_fails_leaves_the_model_as_it_was(graphs, monkeypatch):
    pipe = pipeline()
    before = parts(pipe.transformer)

    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(steps, "replay_calls", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        ptq4dm.optimize(pipe, compiled=True)
    assert parts(pipe.transformer) == before
