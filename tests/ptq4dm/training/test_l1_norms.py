"""`train --norm l1`: a model that is trained with L1 normalization is saved, loaded, quantized and served with it."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from PIL import Image

import ptq4dm
from helpers import same
from ptq4dm import Plan, ShiftQuantConfig, UserError
from ptq4dm.layers.shift.norms import RATIO, norms_of
from ptq4dm.training import exhibition
from ptq4dm.training import run as run_module

pytestmark = pytest.mark.usefixtures("one_thread", "new_accelerate")
SHORT = {"images": 16, "batch_size": 4, "log_every": 2, "evaluate_every": 8, "held_out": 1, "sample_steps": 1}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(exhibition, "GRID", 8)  # pictures to look at
    folder, random = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def pipeline():
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    return DDPMPipeline(net, DDIMScheduler())


def call(pipe):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return pipe.unet(torch.randn(2, 3, 16, 16, generator=g), torch.tensor([5, 800]))[0]


def test_it_is_saved_and_loaded_with_its_norms(tmp_path, pictures):
    pipe = pipeline()
    trained = ptq4dm.train(pipe, pictures, ShiftQuantConfig(**SHORT, norm="l1"), tmp_path / "run")
    norms = norms_of(trained.unet)
    count = sum(type(module) is torch.nn.GroupNorm for module in pipe.unet.modules())
    assert len(norms) == count > 5 and not norms_of(pipe.unet)
    assert all(0.9 < ratio < 2 and ratio != RATIO for ratio in norms.values())  # measured
    trained.save_pretrained(tmp_path / "model")
    entry = json.loads((tmp_path / "model" / "unet" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "ptq4dm" and entry["plan"]["norms"].keys() == norms.keys()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert norms_of(loaded.unet) == norms and torch.equal(call(loaded), call(trained))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(call(DiffusionPipeline.from_pretrained(tmp_path / "again")), call(trained))


def test_it_is_quantized_and_dequantized_with_its_norms(tmp_path, pictures):
    trained = ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT, norm="l1"), tmp_path / "run")
    trained.save_pretrained(tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    floats = call(pipe)
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    packed = call(pipe)
    assert 0 < (packed - floats).norm() < 0.1 * floats.norm()
    pipe.save_pretrained(tmp_path / "packed")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    assert norms_of(loaded.unet) == norms_of(trained.unet) and torch.equal(call(loaded), packed)
    loaded.unet.dequantize()
    before = call(loaded)
    loaded.save_pretrained(tmp_path / "floats")
    again = DiffusionPipeline.from_pretrained(tmp_path / "floats")
    assert norms_of(again.unet) == norms_of(trained.unet) and torch.equal(call(again), before)
    plan = ptq4dm.quantization_config(pipe.unet).plan
    other = DiffusionPipeline.from_pretrained(tmp_path / "model")
    ptq4dm.quantize(other, ptq4dm.RTNConfig(plan=plan))
    assert torch.equal(call(other), packed)


def test_a_resumed_run_gives_the_same_bits(tmp_path, pictures, monkeypatch):
    config = ShiftQuantConfig(**SHORT, norm="l1", bits=16)
    whole = ptq4dm.train(pipeline(), pictures, config, tmp_path / "whole")
    batch = run_module.Run.batch

    def interrupted(run, step, *rest, **more):
        if step == 3:
            raise KeyboardInterrupt
        return batch(run, step, *rest, **more)

    monkeypatch.setattr(run_module.Run, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ptq4dm.train(pipeline(), pictures, config, tmp_path / "parts")
    monkeypatch.setattr(run_module.Run, "batch", batch)
    resumed = ptq4dm.train(pipeline(), pictures, config, tmp_path / "parts", resume=True)
    assert same(whole.unet.state_dict(), resumed.unet.state_dict())
    assert norms_of(whole.unet) == norms_of(resumed.unet)


def test_plans_that_are_refused():
    pipe = pipeline()
    kind = type(ptq4dm.quantization_config(trained_with(pipe)))
    with pytest.raises(UserError, match="'conv_in' is no norm of it"):
        ptq4dm.quantize(pipeline(), ptq4dm.RTNConfig(plan=Plan("rtn", norms={"conv_in": 1.25})))
    with pytest.raises(UserError, match="of a model with other norms"):
        ptq4dm.quantize(pipeline(), ptq4dm.RTNConfig(plan=Plan("rtn", norms={"conv_norm_out": 1.25})))
    with pytest.raises(UserError, match="norm 'conv_norm_out' has the ratio 1000"):
        Plan("rtn", norms={"conv_norm_out": 1000.0}).check()
    with pytest.raises(UserError, match="a trained model is floats; quantize it with a recipe"):
        ptq4dm.quantize(pipeline(), kind())
    assert "norm" not in ShiftQuantConfig().identity() and ShiftQuantConfig(norm="l1").identity()["norm"] == "l1"
    with pytest.raises(UserError, match="norm"):
        ShiftQuantConfig(norm="l2")


def trained_with(pipe):
    from ptq4dm.layers.shift.convert import to_integers
    from ptq4dm.quantization.diffusers_bridge import mark_norms

    to_integers(pipe.unet, None, norms=True)
    mark_norms(pipe.unet)
    return pipe.unet
