"""Training on the pictures of a folder: it learns, goes on to the bit, leaves a plain model, and refuses in words."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from PIL import Image
from torch import nn

import ptq4dm
from ptq4dm import ShiftQuantConfig, UserError
from ptq4dm.files.log import read_lines
from ptq4dm.kernels.shift.products import kernel_name
from ptq4dm.layers.shift.layers import ShiftConv2d, ShiftLinear
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.samplers import OneStepScheduler
from ptq4dm.training import exhibition
from ptq4dm.training import run as run_module
from ptq4dm.training.networks import Networks
from ptq4dm.training.pictures import read_pictures, split
from ptq4dm.training.schedule import even_times
from ptq4dm.training.task import Batch, Task, seed_of

pytestmark = pytest.mark.usefixtures("one_thread", "new_accelerate")
SHORT = {"images": 24, "batch_size": 4, "log_every": 2, "evaluate_every": 12, "held_out": 2, "sample_steps": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """20 pictures, half of them in each of two sub-folders."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(10):
            pixels = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def unet(dropout=0.3):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, dropout=dropout,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


def dit(channels=3, classes=2):
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=channels, out_channels=2 * channels, num_layers=1,
        sample_size=16, patch_size=8, num_embeds_ada_norm=classes,
    )  # fmt: skip


def pipeline():
    return DDPMPipeline(unet(), DDIMScheduler())


def weights(pipe):
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return {name: one.clone() for name, one in net.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_run_and_what_it_leaves(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(exhibition, "GRID", 8)
    pipe, folder = pipeline(), tmp_path / "run"
    before, state = weights(pipe), torch.get_rng_state()
    trained = ptq4dm.train(pipe, pictures, ShiftQuantConfig(**SHORT | {"sample_steps": 2}), folder)
    assert same(weights(pipe), before) and not same(weights(trained), before)
    assert torch.equal(torch.get_rng_state(), state)  # the process's random numbers are not ours
    assert not any(isinstance(m, (ShiftLinear, ShiftConv2d)) for m in trained.unet.modules())
    lines = read_lines(folder / "log.jsonl")
    steps = [(line["stage"], line.get("step")) for line in lines]
    seen = [("training", 2), ("training", 3), ("evaluation", 3), ("gradients", 3), ("training", 4), ("training", 6)]
    assert steps == [("start", None), *seen, ("evaluation", 6), ("gradients", 6)]
    start, last = lines[0], lines[-1]
    window, pixel = (kernel_name(torch.device("cpu"), size) for size in ((3, 3), (1, 1)))
    assert set(start["kernels"]) <= {window, pixel} and sum(start["kernels"].values()) == start["layers"]
    assert start["groups"] == [3, 3] and start["learning_rate"] == ShiftQuantConfig(**SHORT).learning_rate
    assert start["layers"] > 5 and start["kept_bytes"] < 0.85 * start["kept_bytes_in_floats"]
    assert [len(line["bins"]) for line in (last,)] == [10] and sum(one["samples"] for one in last["bins"]) == 2
    assert all(0 < line["loss"] < 3 for line in lines if line["stage"] == "training")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == ["checkpoint.safetensors", "log.jsonl", "samples/000000012.png", "samples/000000024.png"]


def test_the_average_is_part_of_no_graph():
    networks = Networks(nn.Linear(2, 2), ShiftQuantConfig(bits=16), Accelerator(cpu=True))
    for step in range(2):
        networks.descend(step, networks.call(torch.ones(1, 2)).sum())
    assert all(parameter.grad_fn is None for parameter in networks.average.parameters())


@pytest.mark.parametrize("config", [{}, {"bits": 4, "served": True}, {"bits": 16}])
def test_a_resumed_run_gives_the_same_bits(tmp_path, pictures, config, monkeypatch):
    config = ShiftQuantConfig(**SHORT, **config)
    whole = ptq4dm.train(pipeline(), pictures, config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            ptq4dm.train(pipeline(), pictures, config, tmp_path / "parts")
    resumed = ptq4dm.train(pipeline(), pictures, config, tmp_path / "parts", resume=True)
    assert same(weights(whole), weights(resumed))
    one, other = ((tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other
    logs = [read_lines(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    for line in logs[0] + logs[1]:
        line.pop("images_per_second", None)
    assert logs[0] == logs[1]


def stop_after(patch, steps):
    before = run_module.Run.batch

    def batch(run, step):
        if step == steps:
            raise KeyboardInterrupt
        return before(run, step)

    patch.setattr(run_module.Run, "batch", batch)


def test_it_learns(tmp_path, pictures):
    config = ShiftQuantConfig(**SHORT | {"images": 400, "evaluate_every": 200}, learning_rate=5e-3, ema_decay=0.5)
    ptq4dm.train(pipeline(), pictures, config, tmp_path / "run")
    losses = [line["loss"] for line in read_lines(tmp_path / "run" / "log.jsonl") if line["stage"] == "training"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_a_budget_of_minutes_stops_and_goes_on(tmp_path, pictures):
    stopped = ShiftQuantConfig(**SHORT, minutes=1e-9)
    ptq4dm.train(pipeline(), pictures, stopped, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "log.jsonl")
    assert max(line.get("step", 0) for line in lines) == 1  # the clock is read after each
    ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT), tmp_path / "run", resume=True)
    assert max(line.get("step", 0) for line in read_lines(tmp_path / "run" / "log.jsonl")) == 6


def test_held_out_pictures_are_at_the_middles_of_equal_parts():
    """One picture alone is in the middle of the schedule, not at its end, where the loss says least."""
    assert even_times(1, 1000).tolist() == [500] and even_times(2, 1000).tolist() == [250, 750]
    assert even_times(3, 7).tolist() == [1, 3, 5] and even_times(0, 1000).tolist() == []
    for number in (1000, 5000):  # where each time has the same number of pictures
        assert torch.equal(even_times(number, 1000), torch.arange(number) * 1000 // number)


def test_a_run_looks_at_its_held_out_pictures_there(tmp_path, pictures, monkeypatch):
    seen = []
    loss = exhibition.Exhibition.loss
    monkeypatch.setattr(
        exhibition.Exhibition, "loss", lambda self, net: seen.append([one.t for one in self.held]) or loss(self, net)
    )
    config = ShiftQuantConfig(**SHORT | {"held_out": 2, "batch_size": 1, "images": 1})
    ptq4dm.train(pipeline(), pictures, config, tmp_path / "run")
    assert torch.cat(seen[0]).tolist() == [250, 750]  # in batches of one


def test_nothing_need_be_held_out(tmp_path, pictures):
    ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT | {"held_out": 0}), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "log.jsonl")
    assert lines[-1]["step"] == 6 and not any("held_out" in line for line in lines)


def test_what_is_interrupted_at_once_can_be_resumed(tmp_path, pictures, monkeypatch):
    """The checkpoint of step 0: the same weights as of a run in one piece."""
    whole = ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT), tmp_path / "whole")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Networks, "descend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT), tmp_path / "run")
    again = ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT), tmp_path / "run", resume=True)
    assert same(weights(again), weights(whole))


def test_class_conditional_models_and_latents(tmp_path, pictures):
    pixels = PixelDiTPipeline(dit(), DDIMScheduler())
    trained = ptq4dm.train(pixels, pictures, ShiftQuantConfig(**SHORT), tmp_path / "pixels")
    assert not same(weights(trained), weights(pixels))
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    latents = DiTPipeline(dit(4), vae, DDIMScheduler())
    task = Task(latents)
    assert task.picture_size == (32, 32) and task.channels == 3
    data = task.data(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.Generator().manual_seed(0))
    assert data.shape == (2, 4, 16, 16)
    config = ShiftQuantConfig(**SHORT | {"images": 8})
    assert not same(weights(ptq4dm.train(latents, pictures, config, tmp_path / "latents")), weights(latents))


class Says(nn.Module):
    """A network whose prediction is its input; it keeps the times that it was told."""

    def forward(self, x, t, return_dict):
        self.told = t
        return (x,)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_targets_of_the_loss(target):
    images = torch.rand(2, 3, 16, 16)
    pipe = DDPMPipeline(unet(), DDIMScheduler(prediction_type=target))
    batch = Batch(images, torch.randn(2, 3, 16, 16), torch.tensor([0, 999]), None)
    x = pipe.scheduler.add_noise(images, batch.noise, batch.t)
    wanted = {
        "epsilon": batch.noise,
        "sample": images,
        "v_prediction": pipe.scheduler.get_velocity(images, batch.noise, batch.t),
    }[target]
    net = Says()
    torch.testing.assert_close(Task(pipe).loss(net, batch), (x - wanted).square().flatten(1).mean(1))
    assert net.told.tolist() == [0, 999]


def test_a_flow_learns_the_velocity_and_is_told_the_times_of_its_scheduler():
    pipe = PixelDiTPipeline(dit(), FlowMatchEulerDiscreteScheduler())
    images, noise, t = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([249, 999])
    net, sigma = Says(), torch.tensor([0.25, 1.0]).view(2, 1, 1, 1)
    x = sigma * noise + (1 - sigma) * images
    loss = Task(pipe).loss(net, Batch(images, noise, t, None))
    torch.testing.assert_close(loss, (x - (noise - images)).square().flatten(1).mean(1))
    assert net.told.tolist() == [250.0, 1000.0] and set(net.told.tolist()) <= set(pipe.scheduler.timesteps.tolist())


def test_a_flow_model_trains_and_samples(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(exhibition, "GRID", 8)
    pipe = PixelDiTPipeline(dit(), FlowMatchEulerDiscreteScheduler())
    few = SHORT | {"images": 16, "batch_size": 16, "evaluate_every": 16, "sample_steps": 1}
    trained = ptq4dm.train(pipe, pictures, ShiftQuantConfig(**few), tmp_path / "run")
    assert not same(weights(trained), weights(pipe))
    assert type(trained.scheduler) is FlowMatchEulerDiscreteScheduler and any((tmp_path / "run/samples").iterdir())


def test_trained_as_served_is_served_as_trained(tmp_path, pictures):
    """The codes of RTNConfig at these widths give what the network gave in training."""
    config = ShiftQuantConfig(**SHORT, weight_bits=4, activation_bits=4, served=True)
    with pytest.MonkeyPatch.context() as patch:
        runs = []
        go = run_module.Run.go
        patch.setattr(run_module.Run, "go", lambda run: runs.append(run) or go(run))
        trained = ptq4dm.train(pipeline(), pictures, config, tmp_path / "run")
    ptq4dm.quantize(trained, ptq4dm.RTNConfig(weight_bits=4, activation_bits=4, activations="dynamic"))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 800])
    with torch.no_grad():
        one, other = runs[0].networks.average(x, t)[0], trained.unet(x, t)[0]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_pictures_of_a_folder(tmp_path, pictures):
    found = read_pictures(pictures, (16, 16), 3, 2)
    assert found.images.shape == (20, 3, 16, 16) and found.labels.tolist() == [0] * 10 + [1] * 10
    kept, held = split(found, 256)
    assert len(held) == 2 and len(kept) == 18 and held.labels.tolist() == [0, 1]
    wide = tmp_path / "wide"
    wide.mkdir()
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # the middle
    Image.fromarray(pixels).save(wide / "a.png")
    assert read_pictures(wide, (8, 8), 3, None).images.min() == 255
    assert read_pictures(wide, (8, 8), 1, None).images.shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match=r"the model knows 2 classes, .* needs 2 sub-folders .* pictures beside them"):
        read_pictures(wide, (8, 8), 3, 2)
    with pytest.raises(UserError, match=r"needs 3 sub-folders .* it has 2"):
        read_pictures(pictures, (8, 8), 3, 3)


def test_seeds_of_keys():
    seeds = {seed_of(seed, step) for seed in range(4) for step in range(50)}
    assert len(seeds) == 200 and all(0 <= seed < 2**56 for seed in seeds)


def test_what_is_refused(tmp_path, pictures):
    config, folder = ShiftQuantConfig(**SHORT), tmp_path / "run"
    with pytest.raises(UserError, match="there is no checkpoint at .* to resume"):
        ptq4dm.train(pipeline(), pictures, config, folder, resume=True)
    ptq4dm.train(pipeline(), pictures, config, folder)
    with pytest.raises(UserError, match="is not empty; go on with the run in it"):
        ptq4dm.train(pipeline(), pictures, config, folder)
    with pytest.raises(UserError, match=r"of a run with other settings \(bits\)"):
        ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT, bits=5), folder, resume=True)
    half = DDPMPipeline(unet().half(), DDIMScheduler())
    with pytest.raises(UserError, match="the model is loaded in torch.float16; load it in float32"):
        ptq4dm.train(half, pictures, config, tmp_path / "other")
    with pytest.raises(UserError, match="learning needs a model with alpha_bar at whole timesteps .* or a flow"):
        ptq4dm.train(PixelDiTPipeline(dit(), EDMEulerScheduler()), pictures, config, tmp_path / "other")
    for few in (OneStepScheduler(), LCMScheduler()):  # its loss would fall, and its few steps be lost
        student = DDPMPipeline(unet(), few)
        with pytest.raises(UserError, match=f"{type(few).__name__} is of a distilled model.* take its teacher"):
            ptq4dm.train(student, pictures, config, tmp_path / "other")
    packed = pipeline()
    ptq4dm.quantize(packed, ptq4dm.RTNConfig(activations="dynamic"))
    with pytest.raises(UserError, match="the model is quantized; train it in full precision"):
        ptq4dm.train(packed, pictures, config, tmp_path / "other")
    with pytest.raises(UserError, match="drop_captions=0.1 is for models of text, and this one learns"):
        ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT, drop_captions=0.1), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="is not a folder of images"):
        ptq4dm.train(DDIMPipeline(unet(), DDIMScheduler()), tmp_path / "nothing", config, tmp_path / "other")
    with pytest.raises(
        UserError, match=r"came to NaN or infinity by step \d+; start anew with a lower --learning-rate"
    ):
        ptq4dm.train(pipeline(), pictures, ShiftQuantConfig(**SHORT, learning_rate=1e30), tmp_path / "wild")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 12}, "bits must be from 2 to 8, or 16 for floats; got 12"),
        ({"bits": 16, "served": True}, "bits=16 trains in floats and leaves no place for served=True"),
        ({"bits": 16, "wide": True}, "bits=16 trains in floats and leaves no place for wide=True"),
        ({"served": True, "wide": True}, "served=True trains on the grids .* leaves no place for wide=True"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"minutes": -1}, "minutes must be positive"),
        ({"ema_decay": 1}, "ema_decay is at least 0"),
        ({"betas": (0.9, 1.0)}, "betas lie in"),
        ({"precision": "fp16"}, "precision must be 'no' or 'bf16'"),
        ({"groups": 9}, "groups"),
        ({"widths": 4}, "widths"),
    ],
)
def test_options_that_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        ShiftQuantConfig(**options)


def test_settings_are_plain_values():
    config = ShiftQuantConfig(precision=torch.bfloat16)
    assert config.precision == "bf16" and json.loads(json.dumps(config.identity())) == config.identity()
    assert str(config.widths) == "6/6/6, 4 groups" and ShiftQuantConfig(bits=16).widths is None
    kept = {wide: ShiftQuantConfig(wide=wide).identity().get("wide", False) for wide in (None, True, False)}
    assert kept == {None: True, True: True, False: False}  # as runs of earlier versions say it
    assert ShiftQuantConfig().widens and not ShiftQuantConfig(served=True).widens
