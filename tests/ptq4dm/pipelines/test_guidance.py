"""Guidance in an interval: the recursion written out, the rows that are computed, pipelines of many kinds."""

import inspect

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import ptq4dm
from models import pixel_dit
from ptq4dm.caching.step_plan import plain_plan
from ptq4dm.cli.main import main
from ptq4dm.errors import UserError
from ptq4dm.pipelines.denoiser import denoiser_names
from ptq4dm.pipelines.guidance import LOOKS
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.pipelines.sampling import call_pipeline
from ptq4dm.samplers import FitConfig, fit

# The condition in the second half of the rows, in the first (DiT), turned around (Lumina), in a second call
# (Flux, Wan), rescaled (Lumina2), of two denoisers, with noise in each step (HunyuanDiT).
KINDS = {
    "StableDiffusionPipeline": "guidance_scale",
    "DiTPipeline": "guidance_scale",
    "LuminaPipeline": "guidance_scale",
    "Lumina2Pipeline": "guidance_scale",
    "FluxPipeline": "true_cfg_scale",
    "WanPipeline, two transformers": "guidance_scale",
    "HunyuanDiTPipeline": "guidance_scale",
    "StableDiffusionXLControlNetPipeline": "guidance_scale",
}


def tiny(scheduler):
    pipe = PixelDiTPipeline(pixel_dit(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(result):
    return next(getattr(result, name) for name in ("images", "frames") if hasattr(result, name))


def test_is_the_recursion_with_guidance_in_the_interval_alone(one_thread):
    pipe = tiny(FlowMatchEulerDiscreteScheduler())
    found = ptq4dm.sample(
        pipe,
        [1, 2],
        num_inference_steps=5,
        conditioning={"class_labels": [3, 7]},
        pipeline_kwargs={"guidance_scale": 3.0, "guidance_interval": (0.3, 0.8)},
    )
    labels = torch.tensor([7, 3])  # of seeds 1 and 2
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    for sigma in (1.0, 0.8, 0.6, 0.4, 0.2):
        t = torch.full((2,), 1000 * sigma)
        with torch.no_grad():
            velocity = pipe.transformer(x, t, class_labels=labels).sample
            if 0.3 <= sigma <= 0.8:
                without = pipe.transformer(x, t, class_labels=torch.full((2,), pipe.num_classes)).sample
                velocity = without + 3.0 * (velocity - without)
        x = x - 0.2 * velocity
    torch.testing.assert_close(found, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_outside_of_the_interval_half_of_the_rows_are_computed(one_thread):
    pipe, rows = tiny(DDIMScheduler()), []

    def count(module, args):
        rows.append(len(args[0]))

    kwargs = {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}
    pipe.transformer.pos_embed.proj.register_forward_pre_hook(count)  # torch's own sees the look, too
    ptq4dm.sample(pipe, range(4), num_inference_steps=5, pipeline_kwargs=kwargs)
    # A look at two images, with guidance, then without and with; then the run: times 0.8, 0.6, 0.4, 0.2 and 0.
    assert rows == [4, 2, 4, 4, 8, 8, 4, 4]
    rows.clear()  # another batch needs no look; other arguments do, and another scheduler
    ptq4dm.sample(pipe, range(2), num_inference_steps=5, pipeline_kwargs=kwargs)
    assert rows == [2, 4, 4, 2, 2]
    for change in ("arguments", "scheduler", "nothing"):
        rows.clear()
        if change == "scheduler":
            pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
        more = kwargs | {"guidance_scale": 3.0}
        ptq4dm.sample(pipe, range(2), num_inference_steps=5, pipeline_kwargs=more)
        assert len(rows) == (5 if change == "nothing" else 8)


@pytest.mark.parametrize("watcher", ["collect", "record", "fit", "cached_steps", "plan_cached_steps"])
def test_the_look_is_no_generation_to_who_watches(watcher, one_thread):
    """What is recorded, fitted or planned is the same whether the pipeline had been looked at before or not."""
    options = {"pipeline_kwargs": {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}}

    def watched(pipe):
        if watcher == "collect":  # all in one batch, so that the first generation is the one that is recorded
            config = ptq4dm.CalibrationConfig(num_samples=8, num_inference_steps=5, batch_size=8)
            calls = ptq4dm.collect(pipe, config, **options).recorded()
            assert len(calls) == 16  # two rows a seed
            return [calls.time]
        if watcher == "record":
            with ptq4dm.record(pipe.transformer) as calls:
                ptq4dm.sample(pipe, range(3), num_inference_steps=5, **options)
            assert len(calls) == 5
            return [calls.time]
        if watcher == "fit":
            table = fit(
                pipe, FitConfig(evaluations=[2], num_trajectories=4, teacher_steps=5), **options
            ).config.tables
            return [torch.tensor(table["2"]["scale"]), torch.tensor(table["2"]["timesteps"])]
        if watcher == "cached_steps":
            with ptq4dm.cached_steps(pipe, plain_plan(5, [0, 1, 3], 0)) as cache:
                images = ptq4dm.sample(pipe, range(3), num_inference_steps=5, **options)
            assert cache.computed + cache.reused == 5
            return [images]
        config = ptq4dm.StepPlanConfig(num_inference_steps=8, reuse=0.25, num_samples=2)
        plan = ptq4dm.plan_cached_steps(pipe, config, **options)
        return [torch.tensor(plan.times), torch.tensor(plan.computed), torch.tensor(plan.error)]

    pipe = PixelDiTPipeline(pixel_dit(num_layers=3), DDIMScheduler())
    LOOKS.clear()
    first, second = watched(pipe), watched(pipe)
    assert LOOKS and all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", KINDS)
def test_pipelines_of_many_kinds(name, catalogue, one_thread):
    """In the whole interval nothing changes, to the bit; in one without steps the condition stands alone: as where
    the unconditional prediction is put in the place of the conditional one, whichever way the pipeline mixes them."""
    case, scale = catalogue.PIPELINES[name](), KINDS[name]
    parameters = inspect.signature(case.pipe.__call__).parameters
    kwargs = case.pipeline_kwargs | ({"guidance_scale": 1.0} if "guidance_scale" in parameters else {})
    conditioning = case.conditioning | ({"negative_prompt": ["bad", "worse"]} if scale == "true_cfg_scale" else {})

    def run(given, **more):
        options = {"conditioning": given, "pipeline_kwargs": {**kwargs, scale: 3.0, **more}, "bare": case.plain}
        return torch.as_tensor(
            images_of(call_pipeline(case.pipe, [0, 1][: 2 - case.alone], num_inference_steps=3, **options))
        )

    usual = run(conditioning)
    assert torch.equal(run(conditioning, guidance_interval=(0.0, 1.0)), usual)
    alone = run(conditioning, guidance_interval=(1e-7, 1e-6))
    assert not torch.equal(alone, usual)
    for network in map(case.pipe.__getattribute__, denoiser_names(case.pipe)):
        assert "forward" not in vars(network) and not network._forward_pre_hooks
    assert "step" not in vars(case.pipe.scheduler)
    if "negative_prompt" in parameters:  # without the condition's opposite nothing depends on what it is
        other = {**conditioning, "negative_prompt": ["something else", "of this kind"]}
        assert torch.equal(run(other, guidance_interval=(1e-7, 1e-6)), alone)
        assert not torch.equal(run(other), usual)


def test_unknown_ways_and_wrong_intervals_are_told(catalogue, one_thread):
    pipe = tiny(DDIMScheduler())

    def run(interval, scale=2.0, pipe=pipe, more=None, **options):
        kwargs = {**(more or {}), "guidance_scale": scale, "guidance_interval": interval}
        ptq4dm.sample(pipe, [0], num_inference_steps=3, pipeline_kwargs=kwargs, **options)

    for wrong in (0.5, (0.8, 0.2), (0.1, 1.5), (0.1, 0.2, 0.3), ("a", "b"), "ab"):
        with pytest.raises(UserError, match="guidance_interval"):
            run(wrong)
    with pytest.raises(UserError, match="does not guide with these arguments"):
        run((0.1, 0.8), scale=1.0)
    # Lists of pictures; texts whose rows are not the first dimension.
    for name, reason in {
        "ZImagePipeline": "",
        "HiDreamImagePipeline": "its rows are not computed each by itself",
    }.items():
        case = catalogue.PIPELINES[name]()
        with pytest.raises(UserError, match=f"does not know how {name} guides.*{reason}"):
            run((0.1, 0.8), pipe=case.pipe, more=case.pipeline_kwargs, conditioning=case.conditioning)


def test_on_the_command_line(tmp_path, capsys):
    tiny(DDIMScheduler()).save_pretrained(tmp_path / "m")
    command = ["generate", "--model", str(tmp_path / "m"), "--num-images", "2", "--steps", "4", "--output"]
    guided = ["--guidance-scale", "3", "--guidance-interval", "0.1", "0.8"]
    assert main([*command, str(tmp_path / "a"), *guided]) == 0
    capsys.readouterr()
    assert main([*command, str(tmp_path / "a"), "--guidance-scale", "3"]) == 2  # other settings, other pictures
    assert "pipeline_kwargs" in capsys.readouterr().err
    model = str(tmp_path / "m")
    evaluate = ["evaluate", "--model", model, "--full-precision", model, "--num-paired", "2", "--metric", "none"]
    evaluate += ["--steps", "2", "--output", str(tmp_path / "e"), "--guidance-interval", "0.1", "0.8"]
    assert main([*evaluate, "--guidance-scale", "3"]) == 0
    assert main([*evaluate, "--guidance-scale", "1"]) == 2
    assert "does not guide" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "b"), "--guidance-interval", "0.1", "0.8"]) == 2
    assert "does not guide" in capsys.readouterr().err
