"""Schedules fitted to tiny pipelines of diffusers' own classes, and teachers that a model cannot follow."""

import json

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, FlowMatchEulerDiscreteScheduler

import models
import ptq4dm
from ptq4dm.cli.main import main
from ptq4dm.errors import UserError
from ptq4dm.quantization.saving import RECORD
from ptq4dm.samplers import FitConfig, FittedScheduler, fit
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.fitting.fit import endpoint_error
from ptq4dm.samplers.fitting.trajectories import record

CONFIG = FitConfig(evaluations=[2], num_trajectories=4, teacher_steps=6)
# They ask a scheduler for a begin index, times beside sigmas, noise levels, a shift of their own, or scaled noise.
NAMES = [
    "FluxPipeline",
    "CogView4Pipeline",
    "WanPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
    "FluxFillPipeline",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_is_nearer_to_the_teacher_on_the_pipelines_own_times(name, catalogue, one_thread):
    case = catalogue.PIPELINES[name]()
    pipe, shifted = case.pipe, name == "FluxPipeline"
    if shifted:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    options = {"conditioning": case.conditioning, "pipeline_kwargs": case.pipeline_kwargs}
    scheduler, own = fit(pipe, CONFIG, **options), pipe.scheduler.config

    def ends(sampler, steps):
        return record(pipe, sampler, range(50, 52), steps, options, 2)

    right = ends(make_sampler("deis", own), 6)
    near, far = (
        endpoint_error(ends(one, 2).states[-1], right.states[-1]) for one in (scheduler, make_sampler("deis", own))
    )
    assert near < far
    table = scheduler.config.tables["2"]
    assert table["timesteps"][0] == right.times[0] and table["timesteps"][1] in right.times
    place = right.times.index(table["timesteps"][1])
    assert table["sigmas"] == [right.sigmas[0], right.sigmas[place], 0.0]
    assert scheduler.sigmas.tolist() == table["sigmas"]
    if shifted:  # as diffusers' own sampler is told them by the pipeline
        assert endpoint_error(ends(pipe.scheduler, 6).states[-1], right.states[-1]) < far
        torch.testing.assert_close(torch.tensor(right.times), pipe.scheduler.timesteps)
        assert (torch.tensor(right.times) - torch.arange(6, 0, -1) * 1000 / 6).abs().max() > 10
        assert FittedScheduler.from_config(scheduler.config).config.tables == scheduler.config.tables


def test_what_begins_in_the_middle_or_is_called_wrongly_is_told(catalogue, one_thread):
    case = catalogue.PIPELINES["FluxImg2ImgPipeline"]()
    options = {"conditioning": case.conditioning, "pipeline_kwargs": case.pipeline_kwargs}
    with pytest.raises(UserError, match="took 5 of 6 steps, and a schedule is fitted to whole generations"):
        fit(case.pipe, CONFIG, **options)
    with pytest.raises(UserError, match="FluxImg2ImgPipeline cannot be called with this .*strength"):
        fit(
            case.pipe,
            CONFIG,
            conditioning=case.conditioning,
            pipeline_kwargs={**case.pipeline_kwargs, "strength": 7.0},
        )
    scheduler = FittedScheduler(tables={"1": {"timesteps": [9], "scale": [1.0], "weights": [[1.0]]}})
    with pytest.raises(UserError, match="begins at its first timestep"):
        scheduler.set_begin_index(1)


def epsilon(**config):
    return DDPMPipeline(models.plain_unet(sample_size=32, **config), DDIMScheduler(timestep_spacing="trailing"))


def flow():
    return ptq4dm.PixelDiTPipeline(models.pixel_dit(sample_size=32), FlowMatchEulerDiscreteScheduler(shift=2.0))


def test_a_teacher_that_cannot_be_followed_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("ptq4dm.samplers.fitting.fit.record", None)  # where the work begins
    with pytest.raises(
        UserError, match="the teacher's model has prediction_type epsilon and the fitted one flow_pre"
    ):
        fit(flow(), CONFIG, teacher=epsilon())
    velocity = epsilon()
    velocity.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(UserError, match="has prediction_type v_prediction and the fitted one epsilon"):
        fit(epsilon(), CONFIG, teacher=velocity)
    small = DDPMPipeline(models.plain_unet(sample_size=16), DDIMScheduler())
    with pytest.raises(UserError, match=r"samples have shape \(3, 16, 16\) and the fitted model's \(3, 32, 32\)"):
        fit(epsilon(), CONFIG, teacher=small)
    small.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(UserError, match="the teacher's sampler deis scales what this model is given"):
        fit(small, CONFIG)
    with pytest.raises(UserError, match="diffusers/euler scales what this model is given"):
        fit(epsilon(), FitConfig(evaluations=[2], teacher="diffusers/euler"))


def of(prediction_type):
    table = {"timesteps": [900.0, 500.0], "scale": [1.0, 1.0], "weights": [[-0.5], [-0.5]]}
    return FittedScheduler(tables={"2": table}, prediction_type=prediction_type)


def test_a_schedule_of_another_prediction_is_refused_whatever_the_config_says(tmp_path):
    of("epsilon").save_pretrained(tmp_path)
    for config in (FlowMatchEulerDiscreteScheduler().config, make_sampler("deis", flow().scheduler.config).config):
        with pytest.raises(UserError, match="fitted to a model of prediction_type epsilon, not flow_prediction"):
            make_sampler(str(tmp_path), config)
    of("flow_prediction").save_pretrained(tmp_path)
    assert make_sampler(str(tmp_path), FlowMatchEulerDiscreteScheduler().config).fitted_for == [2]


def test_a_table_of_rising_times_is_of_a_flow():
    table = {"timesteps": [0.0, 400.0], "scale": [1.0, 1.0], "weights": [[0.1], [0.1]], "sigmas": [0.0, 0.4, 1.0]}
    assert FittedScheduler(tables={"2": table}, prediction_type="flow_prediction").fitted_for == [2]
    with pytest.raises(UserError, match="timesteps must decrease"):
        FittedScheduler(tables={"2": table})
    with pytest.raises(UserError, match="must have 3 sigmas, or none"):
        FittedScheduler(tables={"2": {**table, "sigmas": [1.0]}}, prediction_type="flow_prediction")


def test_the_command_line_tells_what_works_and_leaves_no_folder(tmp_path, capsys):
    flow().save_pretrained(tmp_path / "flow")
    epsilon().save_pretrained(tmp_path / "epsilon")
    DDPMPipeline(models.plain_unet(sample_size=16), DDIMScheduler()).save_pretrained(tmp_path / "small")
    (tmp_path / "flow" / RECORD).write_text(json.dumps({"model": str(tmp_path / "small")}))  # as if quantized
    of("epsilon").save_pretrained(tmp_path / "fit" / "fitted")
    out = tmp_path / "new" / "out"

    def refused(*arguments):
        assert main([*arguments, "--output", str(out), "--quiet"]) == 2
        assert not out.parent.exists()
        return capsys.readouterr().err

    small, large = (["--model", str(tmp_path / name)] for name in ("small", "flow"))
    bench = ["bench", "samplers", "--num-images", "4", "--teacher-steps", "9", "--num-trajectories", "2"]
    assert "fitted in Python, by ptq4dm.samplers.fit(pipe)" in refused(*bench, *small, "--fit")
    assert "32x32 pixel models" in refused(*bench[:4], *small)
    told = refused(*bench, *large, "--fit", "--teacher", str(tmp_path / "epsilon"))
    assert "has prediction_type epsilon and the fitted one flow_prediction" in told
    generate = ["generate", "--num-images", "1", "--sampler"]
    assert "fit one by ptq4dm.samplers.fit(pipe, ...).save_pretrained(FOLDER) in Python" in refused(
        *generate, "fitted", *small
    )
    assert "fit one by `ptq4dm bench samplers --fit`" in refused(*generate, "fitted", *large)
    assert "sampler 'fitted' fixes its order" in refused(*generate, "fitted", *large, "--order", "2")
    assert f"did you mean {tmp_path / 'fit' / 'fitted'}?" in refused(*generate, str(tmp_path / "fit"), *large)
    assert "of prediction_type epsilon, not flow_prediction" in refused(
        *generate, str(tmp_path / "fit" / "fitted"), *large
    )
