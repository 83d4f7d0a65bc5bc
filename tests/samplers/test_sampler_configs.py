"""Configs of schedulers: from diffusers' other schedulers, saved, loaded, and inside a saved pipeline."""

import json

import diffusers
import numpy as np
import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.pipelines.sampling import sample
from ptq4dm.samplers import DDIMScheduler, DEISScheduler, choices

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "deis": (DEISScheduler, {"solver": "t_ab", "order": 2, "timestep_grid": "cubic", "final_denoise": True}),
    "runge-kutta": (DEISScheduler, {"solver": "rho_rk", "rk_method": "3ral", "beta_schedule": "scaled_linear"}),
    "continuous": (DEISScheduler, {"beta_schedule": "continuous", "beta_start": 0.1, "beta_end": 20.0}),
    "betas": (DEISScheduler, {"trained_betas": [0.001 * k for k in range(1, 51)], "num_train_timesteps": 50}),
    "ddim": (DDIMScheduler, {"timestep_grid": "quad", "clip_sample": False, "prediction_type": "v_prediction"}),
}


def run(scheduler, steps=3):
    """Where the scheduler takes some noise, with its own timesteps."""
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(2 * x), t, x).prev_sample
    return x


def same(one, other):
    configs = ({k: v for k, v in s.config.items() if not k.startswith("_")} for s in (one, other))
    return next(configs) == next(configs) and torch.equal(run(one), run(other))


@pytest.mark.parametrize("name", SETTINGS)
def test_round_trip(name, tmp_path):
    kind, options = SETTINGS[name]
    scheduler = kind(**options)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == kind.__name__
    assert same(kind.from_pretrained(tmp_path), kind(**options))
    assert same(kind.from_config(scheduler.config), kind(**options))
    changed = kind.from_config(scheduler.config, timestep_grid="log")
    assert changed.config.timestep_grid == "log" and not torch.equal(run(changed), run(kind(**options)))


@pytest.mark.parametrize(
    "theirs",
    [
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False),
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        diffusers.DPMSolverMultistepScheduler(solver_order=3, timestep_spacing="leading"),
        diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1),
        diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"),
        diffusers.DEISMultistepScheduler(prediction_type="sample"),
        diffusers.UniPCMultistepScheduler(solver_order=3, num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3]),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("kind", [DEISScheduler, DDIMScheduler])
def test_takes_over_the_config_of_another_scheduler(theirs, kind, tmp_path):
    ours = kind.from_config(theirs.config)
    shared = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    assert all(ours.config[name] == theirs.config[name] for name in shared)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert run(ours).isfinite().all()
    ours.save_pretrained(tmp_path)
    assert same(kind.from_pretrained(tmp_path), ours)
    back = type(theirs).from_config(ours.config)
    assert all(back.config[name] == theirs.config[name] for name in shared)


def test_other_schedulers_names_for_the_one_algorithm_are_replaced():
    options = {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True}
    theirs = diffusers.DPMSolverMultistepScheduler(**options)
    ours = DEISScheduler.from_config(theirs.config, solver="t_ab")
    assert (ours.config.algorithm_type, ours.config.solver_type) == ("deis", "logrho")
    assert same(ours, DEISScheduler.from_config(ours.config)) and ours.config.use_karras_sigmas
    quad, edm = DEISScheduler(solver="t_ab"), DEISScheduler(solver="t_ab", timestep_grid="edm")
    assert torch.equal(run(ours), run(edm)) and not torch.equal(run(ours), run(quad))


def test_solver_order_counts_from_one_and_is_read_by_log_rho():
    for order in (0, 1, 2, 3):
        named = DEISScheduler(solver="log_rho", order=order)
        assert torch.equal(run(named, 20), run(DEISScheduler(solver="log_rho", solver_order=order + 1), 20))
    for solver in ("t_ab", "rho_ab", "ipndm"):
        assert torch.equal(run(DEISScheduler(solver=solver, solver_order=1)), run(DEISScheduler(solver=solver)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "euler"}, "unknown solver 'euler'; choose from .*rho_ab, log_rho"),
        ({"order": 4}, "unknown order '4'; choose from 0, 1, 2, 3"),
        ({"order": -1}, "unknown order '-1'"),
        ({"solver": "log_rho", "solver_order": 0}, "unknown solver_order '0'; choose from 1, 2, 3, 4"),
        ({"solver": "log_rho", "solver_order": 5}, "unknown solver_order '5'"),
        ({"solver": "rho_rk", "rk_method": "5rk"}, "unknown rk_method '5rk'; choose from 1euler, 2heun"),
        ({"prediction_type": "noise"}, "unknown prediction_type 'noise'; choose from epsilon"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'; choose linear"),
    ],
)
def test_what_does_not_exist(options, message):
    with pytest.raises(UserError, match=message):
        DEISScheduler(**options)


def test_it_knows_diffusers_schedulers_as_compatible():
    for kind in (DEISScheduler, DDIMScheduler):
        assert diffusers.DEISMultistepScheduler in kind().compatibles


@pytest.fixture
def pipe(unet):
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDIMScheduler(beta_schedule="scaled_linear"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("solver", choices.DEFAULTS)
def test_a_plain_pipeline_call_is_what_ptq4dm_samples(solver, pipe):
    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config, solver=solver)
    images = sample(pipe, [3], num_inference_steps=4)
    plain = pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
    assert torch.allclose(images, torch.from_numpy(plain).permute(0, 3, 1, 2), atol=1e-6)
    assert images.std() > 0.01


@pytest.mark.parametrize("kind", [DEISScheduler, DDIMScheduler])
@pytest.mark.parametrize("form", [list, np.array], ids=["list", "array"])
def test_trained_betas_in_any_form(kind, form):
    betas = np.linspace(0.001, 0.03, 300).tolist()
    theirs = diffusers.UniPCMultistepScheduler(num_train_timesteps=300, trained_betas=betas)
    for config in (dict(theirs.config), {**theirs.config, "_class_name": "UniPCMultistepScheduler"}):
        ours = kind.from_config({**config, "trained_betas": form(betas)})
        np.testing.assert_allclose(ours.betas, betas, rtol=1e-6)
