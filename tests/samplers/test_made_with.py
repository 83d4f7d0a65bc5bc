"""A fitted schedule says what it was made with, and tells a use with other guidance, shift, times or size, once."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler

import models
import ptq4dm
from ptq4dm.cli.main import main
from ptq4dm.errors import UserError
from ptq4dm.samplers import FitConfig, FittedScheduler, fit
from ptq4dm.samplers.comparison.compare import SamplerBench, solve
from ptq4dm.samplers.comparison.table import few_images, table
from ptq4dm.samplers.made_with import arguments_of, given_of, other_arguments, other_times

CONFIG = FitConfig(evaluations=[2], num_trajectories=2, teacher_steps=4)
GUIDED = {"guidance_scale": 2.0, "guidance_interval": (0.1, 0.9)}


def dit():
    return ptq4dm.PixelDiTPipeline(models.pixel_dit(sample_size=32), FlowMatchEulerDiscreteScheduler())


def sampled(pipe, steps=2, **kwargs):
    ptq4dm.sample(pipe, [0, 1], num_inference_steps=steps, pipeline_kwargs=kwargs or None)


def test_another_guidance_is_told_once(capsys, tmp_path):
    pipe = dit()
    pipe.scheduler = fit(pipe, CONFIG, pipeline_kwargs=GUIDED)
    assert pipe.scheduler.config.origin == {
        "pipeline_kwargs": {"guidance_scale": 2.0, "guidance_interval": [0.1, 0.9]},
        "shape": [3, 32, 32],
    }
    capsys.readouterr()
    sampled(pipe, **GUIDED)
    assert capsys.readouterr().err == ""
    for _ in range(2):  # as for one batch after another
        sampled(pipe, guidance_scale=4.0)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "what it gives here was not looked at" in told
    with_both = "fitted with guidance_interval [0.1, 0.9], guidance_scale 2.0, and is used with guidance_scale 4.0"
    assert f"{with_both} and without guidance_interval;" in told
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = FittedScheduler.from_pretrained(tmp_path)
    sampled(pipe, guidance_scale=1.0)  # which is the pipeline's default, and none
    assert "is used without guidance_interval, guidance_scale;" in capsys.readouterr().err


def test_arguments_are_numbers_that_are_no_defaults():
    pipe = dit()
    kwargs = {"guidance_scale": 1.0, "height": 64, "eta": 0.5, "negative_prompt": "a", "guidance_interval": (0, 1)}
    assert arguments_of(pipe, kwargs) == {"eta": 0.5, "guidance_interval": [0, 1]}
    assert other_arguments(None, {"eta": 0.5}) is None  # nobody knows what it was fitted with
    assert "without eta" in other_arguments({"model": "x"}, {"eta": 0.5})  # a command's, which gave none


def test_another_shift_or_size_is_told_once(catalogue, one_thread, capsys):
    case = catalogue.PIPELINES["FluxPipeline"]()
    pipe, kwargs = case.pipe, case.pipeline_kwargs
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.3, max_shift=0.9)
    pipe.scheduler = fit(pipe, CONFIG, conditioning=case.conditioning, pipeline_kwargs=kwargs)
    assert (pipe.scheduler.config.base_shift, pipe.scheduler.config.max_shift) == (0.3, 0.9)
    given = pipe.scheduler.config.tables["2"]["given"]
    assert given["sigmas"] == [1.0, 0.5] and given["mu"] < 0.4  # by the model's own shifts
    capsys.readouterr()

    def call(**more):
        ptq4dm.sample(
            pipe, [0], num_inference_steps=2, conditioning=case.conditioning, pipeline_kwargs={**kwargs, **more}
        )
        return capsys.readouterr().err

    assert call() == ""
    larger = {"height": 4 * (kwargs.get("height") or 8), "width": 4 * (kwargs.get("width") or 8)}
    told = call(**larger)
    assert told.count("\n") == 1 and "its times stay those of that size" in told
    assert call(**larger) == ""
    fresh = FittedScheduler.from_config(pipe.scheduler.config)
    fresh.set_timesteps(sigmas=[1.0, 0.5], mu=given["mu"])
    assert capsys.readouterr().err == ""
    fresh.set_timesteps(sigmas=[1.0, 0.2], mu=given["mu"])
    assert "the sigmas that were given are not read" in capsys.readouterr().err


def test_times_that_a_table_stands_for_are_not_told():
    one = {"timesteps": [900.0, 400.0], "sigmas": [0.9, 0.4, 0.0]}
    for sigmas in ([1.0, 0.5], [0.9, 0.4]):
        assert other_times(one, given_of(sigmas, None, 1.5)) is None  # mu means nothing without a dynamic shift
    assert "the sigmas" in other_times(one, given_of([0.8, 0.4], None, None))
    assert "the timesteps" in other_times(one, given_of(None, torch.tensor([900, 500]), None))
    assert other_times({**one, "given": {"timesteps": [900.0, 500.0]}}, given_of(None, [900, 500], None)) is None


@pytest.mark.parametrize("wrong", [{"sigmas": 3}, {"sigmas": ["a"]}, {"timesteps": [[1, 2]]}, {"mu": "a"}])
def test_what_is_no_time_is_told(wrong):
    scheduler = FittedScheduler(tables={"1": {"timesteps": [999], "scale": [1.0], "weights": [[-1.0]]}})
    with pytest.raises(UserError, match="must be a"):
        scheduler.set_timesteps(1, **wrong)


def test_another_size_of_a_model_without_a_shift_is_told(capsys):
    net = models.plain_unet(sample_size=16)
    pipe = DDPMPipeline(net, DDIMScheduler(timestep_spacing="trailing"))
    pipe.scheduler = fit(pipe, CONFIG)
    capsys.readouterr()
    sampled(pipe)
    assert capsys.readouterr().err == ""
    net.register_to_config(sample_size=8)
    sampled(pipe)
    assert "fitted to samples of shape 3x16x16, and these have 3x8x8" in capsys.readouterr().err


def test_a_teacher_of_another_network_is_told(capsys):
    def small(**config):
        return DDPMPipeline(models.plain_unet(**config), DDIMScheduler(timestep_spacing="trailing"))

    fit(small(), CONFIG, teacher=small(seed=1))
    assert capsys.readouterr().err == ""
    fit(small(), CONFIG, teacher=small(block_out_channels=(16,)))
    told = capsys.readouterr().err
    assert "the teacher's network is another (UNet2DModel with other settings) than the fitted UNet2DModel" in told


# ------------------------------------------------------------------------------------------------ by command


def test_bench_fits_with_guidance(tmp_path, capsys):
    dit().save_pretrained(tmp_path / "m")
    out = tmp_path / "bench"
    bench = ["bench", "samplers", "--model", str(tmp_path / "m"), "--output", str(out), "--num-images", "2"]
    bench += ["--batch-size", "2", "--evaluations", "2"]
    guided = [*bench, "--guidance-scale", "3", "--samplers", "deis", "fitted", "deis"]
    assert main([*guided, "--fit", "--num-trajectories", "2", "--teacher-steps", "4"]) == 0
    told = capsys.readouterr().out
    assert "guidance scale 3" in told and "2 images are fewer than 1,000" in told and "**" not in told
    record = json.loads((out / "samplers.json").read_text())
    assert [row["sampler"] for row in record["rows"]] == ["fitted", "deis"] and record["settings"][
        "guidance_scale"
    ] == 3
    origin = json.loads((out / "fitted" / "scheduler_config.json").read_text())["origin"]
    assert origin["pipeline_kwargs"] == {"guidance_scale": 3.0}
    assert main([*guided, "--fit", "--num-trajectories", "2", "--teacher-steps", "4"]) == 0  # what is there is taken
    assert main([*bench, "--samplers", "deis"]) == 2 and "other settings" in capsys.readouterr().err
    generate = ["generate", "--model", str(tmp_path / "m"), "--sampler", str(out / "fitted"), "--num-images", "1"]
    assert main([*generate, "--guidance-scale", "3", "--output", str(tmp_path / "a")]) == 0
    assert "guidance_scale" not in capsys.readouterr().err
    assert main([*generate, "--output", str(tmp_path / "b")]) == 0
    assert "fitted with guidance_scale 3.0, and is used without guidance_scale" in capsys.readouterr().err
    # `fitted` without a fit is the schedule beside the model; its budgets are looked at before any work.
    bench[5] = str(tmp_path / "more")
    assert main([*bench, "--samplers", "fitted"]) == 2 and "no fitted schedule lies beside" in capsys.readouterr().err
    (out / "fitted").rename(tmp_path / "m" / "fitted")
    assert main([*bench, "--samplers", "fitted"]) == 0
    rows = json.loads((tmp_path / "more" / "samplers.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == [str(tmp_path / "m" / "fitted")]
    assert main([*bench, "3", "--samplers", "fitted"]) == 2
    assert "was fitted for 2 evaluations, and not for 3" in capsys.readouterr().err


def test_the_benchs_guidance_is_the_pipelines():
    pipe = dit()
    right = ptq4dm.sample(pipe, [3, 4], num_inference_steps=3, pipeline_kwargs={"guidance_scale": 2.5})
    noise = torch.cat([torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    pipe.scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    with torch.no_grad():
        images = solve(pipe.transformer.eval(), pipe.scheduler, noise, torch.tensor([3, 4]), 2.5)
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), right)
    unet = DDPMPipeline(models.plain_unet(sample_size=32), DDIMScheduler())
    with pytest.raises(UserError, match="DDPMPipeline takes no guidance_scale"):
        SamplerBench(samplers=["deis"], guidance_scale=2.0).check(unet)


def test_few_images_rank_nothing():
    rows = [{"sampler": "a", "budget": 5, "evaluations": 5, "feature_fid": 3.0}]
    assert few_images(1000) is None and "999 images are fewer than 1,000" in few_images(999)
    assert "**3.00**" in table(rows) and "**" not in table(rows, best=False)
