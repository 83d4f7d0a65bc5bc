"""Any module is recorded, and what time it is in any sampler; several denoisers; calls of another network."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import ptq4dm
from ptq4dm.calibration.call_files import load_calls, save_calls
from ptq4dm.calibration.record import answers, replay
from ptq4dm.calibration.sampled import record_calls
from ptq4dm.errors import UserError
from ptq4dm.layers.base import is_quantized
from recorded import Guided, Positioned, WithIds, tiny_conditional, tiny_dit, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")


# --- any module ---------------------------------------------------------------------------------------------


def test_record_keeps_whole_calls_of_any_module(tmp_path):
    model, seen = tiny_conditional(), []
    embeds = torch.randn(2, 3, 8).double()
    with ptq4dm.record(model) as calls, torch.no_grad():
        for t in (900, 500):
            more = {"text_embeds": embeds[:, 0], "time_ids": torch.ones(2, 6)}
            seen.append(model(torch.randn(2, 4, 8, 8).double(), t, embeds, added_cond_kwargs=more))
    model(torch.randn(1, 4, 8, 8).double(), 3, embeds[:1], added_cond_kwargs={k: v[:1] for k, v in more.items()})
    assert len(calls) == 2 and calls.timestep.tolist() == [900, 500] and calls.time.tolist() == [0.9, 0.5]
    for answer, expected in zip(answers(model, calls), seen, strict=True):
        assert type(answer) is type(expected) and torch.equal(answer.sample, expected.sample)
    assert torch.equal(replay(model, calls), torch.cat([one.sample for one in seen]))
    save_calls(tmp_path / "a.safetensors", {"": calls})
    again = load_calls(tmp_path / "a.safetensors")[""]
    assert all(torch.equal(a.sample, b.sample) for a, b in zip(answers(model, again), seen, strict=True))
    report = ptq4dm.quantize(model.float(), ptq4dm.PTQ4DMConfig(), again)
    assert {row["basis"] for row in report.layers} == {"output"} and report.layers[0]["sqnr"] > 15


def test_times_of_every_kind():
    """One number of a call: the largest of a time per token; shares, thousandths, logarithms."""
    model = torch.nn.Module()
    model.forward = lambda x, timestep=None: x
    for given, times, shares in (
        ([torch.tensor([[0.0, 300.0]]), torch.tensor(900)], [300, 900], [0.3, 0.9]),
        ([0.25, torch.tensor([0.5, 0.5])], [0.25, 0.5], [0.25, 0.5]),
        ([torch.tensor(-1.5), torch.tensor(0.5), torch.tensor(1.0)], [-1.5, 0.5, 1.0], [0, 0.8, 1]),
        ([None, None], [0, 0], [0, 0]),
    ):
        with ptq4dm.record(model) as calls:
            for t in given:
                model(torch.zeros(1), t)
        assert calls.timestep.tolist() == times and calls.time.tolist() == pytest.approx(shares)


def test_recorded_tensors_are_copies():
    model = torch.nn.Identity()
    x = torch.zeros(2)
    with ptq4dm.record(model) as calls:
        model(x)
    x += 1
    (one,) = answers(model, calls)
    one += 1
    assert torch.equal(answers(model, calls)[0], torch.zeros(2))


def test_calls_of_another_network_are_refused():
    one, other = tiny_unet().float(), tiny_conditional().float()
    with ptq4dm.record(one) as calls, torch.no_grad():
        one(torch.randn(1, 3, 8, 8), 5)
    with torch.no_grad():
        changed = copy.deepcopy(one)
        changed.conv_out.weight[0, 0, 0, 0] += 1
    for model in (other, changed):
        with pytest.raises(UserError, match="recorded from another model"):
            ptq4dm.quantize(model, ptq4dm.PTQ4DMConfig(), calls)
    ptq4dm.quantize(one, ptq4dm.PTQ4DMConfig(), calls[0:1])


def test_a_pipeline_with_several_denoisers_is_asked_for_one():
    pipe = Guided(tiny_conditional(), DDIMScheduler())
    pipe.register_modules(prior=tiny_conditional())
    with pytest.raises(UserError, match="several denoisers, unet, prior; record one"), ptq4dm.record(pipe):
        pass
    with pytest.raises(UserError, match="'unet' is a name; give the pipeline or model itself"), ptq4dm.record("unet"):
        pass


def test_quantize_without_any_recorded_call():
    model = tiny_unet().float()
    with ptq4dm.record(model) as calls:
        pass
    with pytest.raises(UserError, match="no calls were recorded"):
        ptq4dm.quantize(model, ptq4dm.PTQ4DMConfig(), calls)


# --- schedulers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["t", "t / 1000", "1000 - t", "1 - t / 1000"])
def test_the_time_that_a_model_sees_is_read_back(scale):
    """Flow models see shares, Mochi counts from the data, Z-Image both: bins are of the scheduler's time."""

    class Scaled(Guided):
        def __call__(self, prompt_embeds=None, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                more = {"text_embeds": prompt_embeds[:, 0], "time_ids": torch.ones(len(prompt_embeds), 6)}
                seen = eval(scale, {"t": t.double()})
                x = torch.zeros(len(prompt_embeds), 4, 8, 8).double()
                self.unet(x, seen, encoder_hidden_states=prompt_embeds, added_cond_kwargs=more)
                self.scheduler.step(x, t, x)

    pipe = Scaled(tiny_conditional(), FlowMatchEulerDiscreteScheduler())
    embeds = {"prompt_embeds": torch.randn(2, 3, 8).double()}
    calls = record_calls(pipe, [0, 1, 2], [999, 666, 0], num_inference_steps=3, conditioning=embeds)
    pipe.scheduler.set_timesteps(3)
    torch.testing.assert_close(calls.time, pipe.scheduler.timesteps.double() / 1000)


def test_logarithms_of_sigma_fill_their_range():
    pipe = SigmaPipe(tiny_unet(), EDMEulerScheduler())
    calls = record_calls(pipe, range(8), [1.0955, 0.7, 0.3, 0.0, -0.4, -0.8, -1.2, -1.5537], num_inference_steps=8)
    pipe.scheduler.set_timesteps(8)
    grid = pipe.scheduler.timesteps.double()
    assert calls.time[0] == pytest.approx(1) and calls.time[-1] == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(calls.timestep, calls.timestep.sort(descending=True).values)
    assert set(calls.timestep.tolist()) <= set(grid.tolist()) and len(calls.timestep.unique()) >= 6


class SigmaPipe(DiffusionPipeline):
    """Scales its input, as samplers in sigma want it."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, batch_size=1, generator=None, num_inference_steps=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator]).double() * 80
        for t in self.scheduler.timesteps:
            eps = self.unet(self.scheduler.scale_model_input(x, t), t).sample
            x = self.scheduler.step(eps, t, x).prev_sample


def test_copies_of_a_scheduler_step_by_themselves():
    """LTX-2 steps its sound with a copy; what is counted must not step the original."""

    class Copying(Guided):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt", prompt_embeds=None):
            self.scheduler.set_timesteps(num_inference_steps)
            copied = copy.deepcopy(self.scheduler)
            x = torch.zeros(len(prompt_embeds), 4, 8, 8).double()
            more = {"text_embeds": prompt_embeds[:, 0], "time_ids": torch.ones(len(prompt_embeds), 6)}
            for t in copied.timesteps:
                self.unet(x, t, encoder_hidden_states=prompt_embeds, added_cond_kwargs=more)
                for one in (self.scheduler, copied):
                    one.step(x, t, x)
                self.indices = self.scheduler.step_index, copied.step_index

    pipe = Copying(tiny_conditional(), FlowMatchEulerDiscreteScheduler())
    embeds = {"prompt_embeds": torch.randn(1, 3, 8).double()}
    calls = record_calls(pipe, [0, 1], [999, 0], num_inference_steps=4, conditioning=embeds)
    pipe.scheduler.set_timesteps(4)
    assert calls.timestep.tolist() == pipe.scheduler.timesteps[[0, -1]].tolist()
    assert pipe.indices == (3, 3)  # three steps of each before the last call


@pytest.mark.parametrize("times", [2, 16])
def test_as_many_rows_of_something_else_as_seeds(times):
    """Position ids [tokens, 3] of as many tokens as there are images are not one row an image."""

    class Ids(Positioned):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.cat([torch.randn(1, 3, 2, 2, generator=g) for g in generator])
            for t in self.scheduler.timesteps:
                self.transformer(x, torch.arange(float(times)), t.expand(len(x)), mode="train")
                x = self.scheduler.step(x, t, x).prev_sample

    asked = [999, 0] * (times // 2)
    calls = record_calls(Ids(WithIds(), DDIMScheduler()), range(times), asked, num_inference_steps=2)
    assert len(calls) == times and all(len(part.call().args[1]) == times for part in calls.batches(3))
    assert calls.shared.keys() == {"1", "mode"} and torch.equal(calls.shared["1"], torch.arange(float(times)))


def test_two_denoisers_share_the_steps(tmp_path):
    """Wan 2.2: one transformer for much noise, one for little; each is calibrated on its own steps."""

    class Two(DiffusionPipeline):
        def __init__(self, transformer, transformer_2, vae, scheduler):
            super().__init__()
            self.register_modules(transformer=transformer, transformer_2=transformer_2, vae=vae, scheduler=scheduler)

        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator])
            for t in self.scheduler.timesteps:
                model = self.transformer if t >= 500 else self.transformer_2
                x = self.scheduler.step(
                    model(x, t.expand(len(x)), class_labels=torch.zeros(len(x)).long()).sample, t, x
                ).prev_sample

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = Two(tiny_dit().float(), tiny_dit().float(), vae, DDIMScheduler(clip_sample=False))
    config = ptq4dm.CalibrationConfig("solver", num_samples=6, num_inference_steps=4, num_bins=2, batch_size=4)
    store = ptq4dm.collect(pipe, config, tmp_path / "both")
    times = {name: one.calls.timestep for name, one in store.components.items()}
    assert list(times) == ["transformer", "transformer_2"] and sum(map(len, times.values())) == 6
    assert times["transformer"].unique().tolist() == [500, 750]
    assert times["transformer_2"].unique().tolist() == [0, 250]
    early = ptq4dm.CalibrationConfig(**{**vars(config), "collector": "ndtc", "mu": 0.9, "sigma": 0.01})
    again = ptq4dm.collect(pipe, early, tmp_path / "early")  # which never reaches the second by itself
    assert set(again.components["transformer_2"].calls.timestep.tolist()) == {250}
    assert len(ptq4dm.collect(pipe, early, tmp_path / "early").others) == 1  # finished: only loaded
    report = ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), store)
    assert report.networks == ["transformer", "transformer_2"] and report.left == ["vae"]
    assert "in full precision: vae" in report.table()
    assert {row["layer"].split(".")[0] for row in report.layers} == {"transformer", "transformer_2"}
    for name in times:
        assert any(is_quantized(module) for module in getattr(pipe, name).modules())


def test_one_of_two_denoisers_by_name():
    pipe = Guided(tiny_conditional().float(), DDIMScheduler())
    pipe.register_modules(prior=tiny_conditional().float())
    options = dict(conditioning={"prompt_embeds": torch.randn(1, 3, 8)})
    config = ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2, num_bins=1)
    with pytest.raises(UserError, match="Guided, called like this, calls prior at none of its steps .seed 0.; name"):
        ptq4dm.collect(pipe, config, **options)
    store = ptq4dm.collect(pipe, config, component="unet", **options)
    report = ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), store)
    assert report.networks == ["unet"] and report.left == ["prior"]
