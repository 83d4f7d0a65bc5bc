"""Cached steps, and plans of them, of networks that `optimize` serves: calls from graphs, compiled code, threads."""

import copy
import threading

import diffusers
import pytest
import torch

import models
import ptq4dm
from ptq4dm import StepPlanConfig, UserError
from ptq4dm.caching.cut import cut
from ptq4dm.caching.deep_part import DeepPart, Kept, reuse_of, under_way
from ptq4dm.caching.step_plan import plain_plan
from ptq4dm.inference import blocks, steps
from ptq4dm.samplers import DEISScheduler
from traced_graphs import TracedGraphs

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = plain_plan(4, (0, 2), 1)
CONFIG = StepPlanConfig(num_inference_steps=4, reuse=0.5, num_samples=2, batch_size=1)
NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the CPU."""
    monkeypatch.setattr(steps, "has_graphs", lambda device: True)
    monkeypatch.setattr(steps, "backend", TracedGraphs)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_pipe():
    return quiet(diffusers.DDPMPipeline(models.unet(layers_per_block=1), DEISScheduler()))


def dit_pipe():
    """Of data, that pictures be what the network says; of noise, nearly all of them are at an end of [0, 1]."""
    return quiet(ptq4dm.PixelDiTPipeline(models.pixel_dit(num_layers=3), DEISScheduler(prediction_type="sample")))


def quantized_pipe():
    pipe = unet_pipe()
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2, num_bins=1))
    ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), store)
    return pipe


def images(pipe, *seeds):
    return ptq4dm.sample(pipe, seeds or [0], num_inference_steps=4)


def network(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def served_from_graphs(pipe, atol):
    """A plan is that of the same pipeline without graphs; steps that are cached then are replayed, to the same
    pictures; and so is the pipeline before and after."""
    plain = copy.deepcopy(pipe)
    ptq4dm.optimize(plain, compiled=False, graphs=False)
    report = ptq4dm.optimize(pipe, compiled=False)
    graphed = network(pipe).forward
    right = images(plain)
    torch.testing.assert_close(images(pipe), right, rtol=0, atol=atol)
    captured = graphed.captures
    assert captured == 1 and graphed.replays == 3

    plan, other = (ptq4dm.plan_cached_steps(one, CONFIG) for one in (pipe, plain))
    assert plan.computed == other.computed and plan.error == pytest.approx(other.error, rel=0.05)
    assert graphed.captures == captured  # each call that is looked at is made once
    torch.testing.assert_close(images(pipe), right, rtol=0, atol=atol)

    captured = graphed.captures
    with ptq4dm.cached_steps(plain, plan):
        reused = images(plain)
    assert (reused - right).abs().max() > 10 * atol  # else it would not be told from a plan that is not followed
    with ptq4dm.cached_steps(pipe, plan) as cache:
        for _ in range(3):
            replayed = graphed.replays
            torch.testing.assert_close(images(pipe), reused, rtol=0, atol=atol)
    assert graphed.captures == captured + 2 and graphed.replays == replayed + 4
    assert cache.reused == 6 and not cache.uncompiled
    torch.testing.assert_close(images(pipe), right, rtol=0, atol=atol)
    report.undo()


@pytest.mark.parametrize("make", [unet_pipe, dit_pipe])
def test_plans_and_cached_steps_of_a_network_with_graphs(make, graphs):
    served_from_graphs(make(), atol=1e-5)


@pytest.mark.gpu
@NEEDS_A_GPU
@pytest.mark.parametrize("make", [unet_pipe, dit_pipe, quantized_pipe])
def test_plans_and_cached_steps_of_a_network_with_graphs_of_cuda(make):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        served_from_graphs(make().to("cuda"), atol=1e-4)


def test_a_network_compiled_as_a_whole_runs_as_written_while_its_steps_are_cached(monkeypatch):
    """torch.compile's code calls what is inside a network by itself, whatever was put there."""
    pipe, compiled = unet_pipe(), []
    with ptq4dm.cached_steps(pipe, PLAN) as cache:
        right = images(pipe)
    assert not cache.uncompiled

    def compiled_by_torch(call, **_):
        return lambda *args, **kwargs: compiled.append(1) or call(*args, **kwargs)

    monkeypatch.setattr(blocks.torch, "compile", compiled_by_torch)
    ptq4dm.optimize(pipe, compiled=True, fused=False)
    before = images(pipe)
    assert len(compiled) == 4
    with ptq4dm.cached_steps(pipe, PLAN) as cache:
        assert torch.equal(images(pipe), right)
    assert len(compiled) == 4 and cache.reused == 2 and "ran as written" in str(cache)
    assert torch.equal(images(pipe), before) and len(compiled) == 8


def test_a_network_that_torch_compiles_by_itself_is_refused():
    pipe = unet_pipe()
    pipe.unet.compile(backend="eager")
    with pytest.raises(UserError, match="'unet' is compiled as a whole"):
        ptq4dm.plan_cached_steps(pipe, CONFIG)


def test_what_is_reused_is_this_threads_alone():
    """A call of another thread that comes meanwhile may take no graph of a call that reuses."""
    model, found = models.unet(layers_per_block=1), {}
    x = torch.randn(1, 3, 8, 8)

    def look():
        found["there"] = reuse_of(model), under_way(*model.modules())

    def call():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        found["here"] = reuse_of(model), under_way(*model.modules())
        return model(x, 5)

    part, kept = DeepPart(model, cut(model, 1)), Kept()
    with torch.no_grad(), part.put_in():
        part.computed(kept, 0, call)
        assert found == {"there": (None, None), "here": ((kept.number, False), part)}
        part.reused(kept, [1.0], call)
        assert found == {"there": (None, None), "here": ((kept.number, True), part)}
        assert reuse_of(model) is None
        with pytest.raises(UserError, match="has cached steps already"), part.put_in():
            pass
    assert under_way(*model.modules()) is None
