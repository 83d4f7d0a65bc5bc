"""Tiny denoisers through OpenVINO, by the verb: outputs, batches, what is told, undone, saved and noticed."""

import copy

import pytest
import torch

import models
import ptq4dm
from helpers import needs_vnni
from ptq4dm.quantization.quantize import quantize

pytest.importorskip("openvino")

from ptq4dm.inference.openvino.compiled import INTEGERS  # noqa: E402
from ptq4dm.inference.openvino.engine import ThroughOpenVINO  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def pipeline(kind="dit"):
    from diffusers import DDIMScheduler, DDPMPipeline

    scheduler = DDIMScheduler(clip_sample=False)
    if kind == "dit":
        pipe = ptq4dm.PixelDiTPipeline(models.pixel_dit(num_layers=2), scheduler)
    else:
        pipe = DDPMPipeline(models.unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network(pipe):
    return pipe.components.get("transformer") or pipe.components["unet"]


def static(pipe):
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2))
    quantize(pipe, ptq4dm.PTQ4DMConfig(modules_to_not_convert=[]), store)
    return pipe


def dynamic(pipe):
    quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    return pipe


def call(model, batch, seed=0, return_dict=False):
    torch.manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8)
    more = {"class_labels": torch.arange(batch) % 10} if type(model).__name__.startswith("DiT") else {}
    with torch.no_grad():
        return model(x, torch.full((batch,), 321), **more, return_dict=return_dict)


def far(given, expected):
    return float((given - expected).square().sum() / expected.square().sum())


@needs_vnni
@pytest.mark.parametrize("kind", ("dit", "unet"))
@pytest.mark.parametrize("made", (static, dynamic))
def test_quantized_denoisers(kind, made):
    pipe = made(pipeline(kind))
    model = network(pipe)
    expected = {batch: call(model, batch)[0] for batch in (1, 3)}
    report = ptq4dm.optimize(pipe, engine="openvino", precision="float32")
    for batch in (3, 1, 3):
        # Layers agree to the last digits; a value that then falls on the other side of a tie moves by one code.
        assert far(call(model, batch)[0], expected[batch]) < 1e-3
    engine = model.forward
    assert isinstance(engine, ThroughOpenVINO) and (engine.converted, engine.captures, engine.replays) == (1, 2, 3)
    products = engine.products()
    assert set(products) == set(engine.layers) and len(products) > 10
    assert all(runs in INTEGERS for runs, _ in products.values())
    assert f"{len(products)} of {len(products)} quantized layers in products of int8" in str(report)
    ptq4dm.unoptimize(pipe)
    assert "forward" not in vars(model) and torch.equal(call(model, 3)[0], expected[3])


def test_outputs_are_of_the_class_of_diffusers():
    model = models.plain_unet()
    expected = call(model, 2, return_dict=True)
    ptq4dm.optimize(model, engine="openvino", precision="float32")
    found = call(model, 2, return_dict=True)
    assert type(found) is type(expected) and far(found.sample, expected.sample) < 1e-8
    assert isinstance(call(model, 2), tuple)


@needs_vnni
def test_a_pipeline_samples_as_before():
    pipe = static(pipeline())
    before = ptq4dm.sample(pipe, (0, 1, 2), num_inference_steps=4)
    ptq4dm.optimize(pipe, engine="openvino", precision="float32")
    after = ptq4dm.sample(pipe, (0, 1, 2), num_inference_steps=4)
    assert float((before - after).square().mean()) < 1e-4
    assert network(pipe).forward.replays == 4


def test_plain_models_in_bfloat16():
    pipe = pipeline()
    model = network(pipe)
    expected = call(model, 2)[0]
    report = ptq4dm.optimize(pipe, engine="openvino", precision="bfloat16")
    assert far(call(model, 2)[0], expected) < 1e-3
    assert "what is not quantized in bfloat16" in str(report) and "quantized layers" not in str(report)


@needs_vnni
@torch.no_grad()
def test_written_weights_are_noticed():
    pipe = dynamic(pipeline())
    model = network(pipe)
    ptq4dm.optimize(pipe, engine="openvino", precision="float32")
    first = call(model, 2)[0]
    layer = model.transformer_blocks[0].attn1.to_v
    layer.weight_scale.mul_(3)
    found = call(model, 2)[0]
    assert far(found, first) > 1e-3 and model.forward.converted == 2
    ptq4dm.unoptimize(pipe)
    assert far(found, call(model, 2)[0]) < 1e-3


def test_as_they_are_with_hooks_gradients_and_in_training():
    model = network(pipeline())
    ptq4dm.optimize(model, engine="openvino")
    call(model, 2)
    seen = []
    handle = model.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    call(model, 2)
    handle.remove()
    model(torch.randn(2, 3, 8, 8), torch.tensor([1, 1]), torch.tensor([1, 1])).sample.sum().backward()
    assert seen == [1] and model.forward.replays == 1
    assert dict(model.forward.plain) == {"'transformer_blocks.0' has a hook": 1, "gradients are enabled": 1}


@needs_vnni
def test_conversions_are_saved_and_found(tmp_path):
    model = network(dynamic(pipeline()))
    expected = call(model, 2)[0]
    other = copy.deepcopy(model)
    for one, loaded in ((model, 0), (other, 1)):
        ptq4dm.optimize(one, engine="openvino", precision="float32", cache=tmp_path / "saved")
        assert far(call(one, 2)[0], expected) < 1e-3
        assert (one.forward.converted, one.forward.loaded) == (1 - loaded, loaded)
    assert all(runs in INTEGERS for runs, _ in other.forward.products().values())
    with torch.no_grad():
        other.transformer_blocks[0].attn1.to_v.weight_scale.mul_(2)
    call(other, 2)
    assert (other.forward.converted, len(list((tmp_path / "saved").iterdir()))) == (1, 2)


@needs_vnni
@pytest.mark.parametrize("options", (dict(), dict(activations="int8"), dict(unsigned=True)), ids=str)
def test_svdquant_keeps_smoothing_and_branch(options):
    pipe = pipeline()
    model = network(pipe)
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2))
    quantize(pipe, ptq4dm.SVDQuantConfig(rank=4, **options), store)
    expected = call(model, 3)[0]
    report = ptq4dm.optimize(pipe, engine="openvino", precision="float32")
    assert far(call(model, 3)[0], expected) < 1e-5
    said = "2 layers run in floats, as their plans have inputs of floats, or scales of groups; the first is '"
    assert said + "transformer_blocks.0.ff.net.2'" in str(report) and str(report).count("in floats") == 1


WRONG = {
    "openvinos": (dict(engine="openvinos"), "engine 'openvinos' is unknown; choose from"),
    "precision": (dict(engine="openvino", precision="int8"), "precision is one of float32, bfloat16"),
    "alone": (dict(cache="folder"), "cache is an engine's"),
    "one": (dict(engine="openvino", weight_cache="1GB"), "weight_cache is for PyTorch's own forward; leave it out"),
    "both": (dict(engine="openvino", fused=True, compiled=False, attention="auto"), "fused and attention are for"),
    "cache": (dict(engine="openvino", cache=3), "cache is a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_sentence(name):
    options, said = WRONG[name]
    model = network(pipeline())
    with pytest.raises(ptq4dm.UserError, match=said):
        ptq4dm.optimize(model, **options)
    assert "forward" not in vars(model)


def test_models_that_it_cannot_take():
    with pytest.raises(ptq4dm.UserError, match="load it in float32"):
        ptq4dm.optimize(network(pipeline()).to(torch.bfloat16), engine="openvino")
    pipe = pipeline()
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2))
    quantize(pipe, ptq4dm.LUTGEMMConfig(bits=3, group_size=None), store)
    with pytest.raises(ptq4dm.UserError, match="OpenVINO cannot serve this model: layer '.*' is of format 'bcq'"):
        ptq4dm.optimize(pipe, engine="openvino")


class Odd(torch.nn.Module):
    def forward(self, x):
        return torch.ops.ptq4dm_traced.unknown(x)


def test_what_it_cannot_convert_is_an_error():
    with torch.library._scoped_library("ptq4dm_traced", "FRAGMENT") as library:
        library.define("unknown(Tensor x) -> Tensor")
        library.impl("unknown", lambda x: x + 1, "CompositeExplicitAutograd")
        model = Odd().eval()
        ptq4dm.optimize(model, engine="openvino")
        with torch.no_grad(), pytest.raises(ptq4dm.UserError, match="OpenVINO cannot convert Odd: .*unknown"):
            model(torch.ones(2, 3))


def test_where_it_is_not_installed(monkeypatch):
    from ptq4dm.inference import engines

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ptq4dm.UserError, match=r"engine 'openvino' is not installed: pip install 'ptq4dm\[openvino\]'"
    ):
        ptq4dm.optimize(network(pipeline()), engine="openvino")
