"""Tables of times that diffusers publishes (Align Your Steps, arXiv:2404.14507) as a pipeline's timesteps."""

import pytest
import torch
from diffusers.schedulers import AysSchedules

import ptq4dm
from analytic import gaussian, noise
from ptq4dm.samplers import DEISScheduler


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("StableDiffusionPipeline", "StableDiffusionTimesteps"),
        ("StableDiffusionXLPipeline", "StableDiffusionXLTimesteps"),
    ],
)
@pytest.mark.parametrize("solver", ["t_ab", "ipndm"])
def test_a_pipeline_calls_its_model_at_the_times_of_the_table(name, table, solver, catalogue, one_thread):
    case = catalogue.PIPELINES[name]()
    case.pipe.scheduler = DEISScheduler.from_config(case.pipe.scheduler.config, solver=solver)
    seen = []
    case.pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(args[1])), with_kwargs=True
    )
    options = {
        "conditioning": case.conditioning,
        "pipeline_kwargs": case.pipeline_kwargs | {"timesteps": AysSchedules[table]},
    }
    images = ptq4dm.sample(case.pipe, [0], num_inference_steps=10, **options)
    assert seen == AysSchedules[table] and images.isfinite().all()


def test_the_table_is_followed_exactly():
    """On Gaussian data the ten steps of the table come as near as ten of a grid do, and nearer than even ones."""
    problem, x = gaussian(), noise(64)
    errors = {}
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for grid, options in {
        "table": {"timesteps": AysSchedules["StableDiffusionTimesteps"]},
        "even": {"num_inference_steps": 10},
    }.items():
        scheduler = DEISScheduler(**config, solver="t_ab", order=2, timestep_grid="linear")
        scheduler.set_timesteps(**options)
        a = scheduler.schedule.alpha_bar
        sample = x
        for t in scheduler.timesteps:
            sample = scheduler.step(problem.epsilon(sample, float(a(float(t)))), t, sample).prev_sample
        right = problem.flow(x, float(a(float(scheduler.timesteps[0]))), float(a(scheduler.schedule.last)))
        errors[grid] = (sample - right).square().mean().sqrt().item()
    assert errors["table"] < 0.1 and errors["table"] < errors["even"]
    assert torch.isfinite(torch.tensor(list(errors.values()))).all()
