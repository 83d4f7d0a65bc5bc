"""EDM's preconditioned models: x = x_0 + sigma n, called with c_in x and log(sigma) / 4, answering F."""

import diffusers
import pytest
import torch

import analytic
from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler
from ptq4dm.samplers.catalog import make_sampler

EULER = diffusers.EDMEulerScheduler


def answer(problem, inputs, t, config):
    """What a perfect network says: F with x_0 = c_skip x + c_out F."""
    sigma, data = float(torch.as_tensor(t).double().mul(4).exp()), config["sigma_data"]
    total = sigma**2 + data**2
    x = inputs * total**0.5
    x0, _ = problem.parts(x, 1.0, sigma)
    c_out = sigma * data / total**0.5 * (-1 if config["prediction_type"] == "v_prediction" else 1)
    return (x0 - data**2 / total * x) / c_out


def solve(scheduler, problem, x, steps, config):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t)
        x = scheduler.step(answer(problem, inputs, t, config), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_order_0_is_diffusers_euler(prediction, schedule):
    theirs = EULER(prediction_type=prediction, sigma_schedule=schedule, sigma_data=0.7, sigma_max=40.0)
    ours = DDIMScheduler.from_config(theirs.config)
    assert isinstance(ours, DEISScheduler) and ours.init_noise_sigma == pytest.approx(theirs.init_noise_sigma)
    problem, x = analytic.gaussian(), analytic.noise(8) * theirs.init_noise_sigma
    results = [solve(scheduler, problem, x, 12, theirs.config) for scheduler in (ours, theirs)]
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-5)
    assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-5)
    assert analytic.rms(results[0] - results[1]) < 1e-4


@pytest.mark.parametrize("options", [{}, {"solver": "ipndm"}, {"solver": "rho_ab"}, {"solver": "log_rho"}], ids=str)
def test_ahead_of_diffusers_on_gaussian_data(options):
    """EDMEuler and EDM's DPM-Solver++ at equal evaluations."""
    theirs = EULER(sigma_max=40.0, sigma_min=0.01)
    problem, x = analytic.gaussian(), analytic.noise(16) * 40.0
    exact = problem.carried(x, (1.0, 40.0), (1.0, 0.0))

    def error(scheduler, steps=14):
        return analytic.rms(solve(scheduler, problem, x, steps, theirs.config) - exact)

    ours = error(DEISScheduler.from_config(theirs.config, **options))
    assert ours < error(make_sampler("diffusers/euler", theirs.config)) / 2
    assert error(DEISScheduler.from_config(theirs.config, **options), 28) < ours / 2
    if not options:
        assert ours < error(make_sampler("diffusers/dpm++2m", theirs.config))


def mixture():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 16, generator=generator, dtype=torch.float64) * 0.7
    covs = 0.2 * torch.eye(16, dtype=torch.float64).expand(5, 16, 16)
    return analytic.Mixture(means, torch.full((5,), 0.2, dtype=torch.float64), covs)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_the_default_is_its_named_order_and_ahead_of_the_one_below(schedule):
    """`t_ab2/edm` on EDM's own grid: bounds on cancelling weights are for grids that a user brings in."""
    config = EULER(sigma_schedule=schedule).config
    problem, x = mixture(), analytic.noise(32) * 80.0

    def ends(steps, **options):
        return solve(DEISScheduler.from_config(config, **options), problem, x, steps, config)

    exact = ends(400, order=3)
    for steps in (8, 10, 20):
        default, below = (analytic.rms(ends(steps, **more) - exact) for more in ({}, {"order": 1}))
        assert default < 0.75 * below
        assert torch.equal(ends(steps), ends(steps, order=2))
    grid = {"karras": "edm", "exponential": "log"}[schedule]
    assert torch.equal(ends(10), solve(make_sampler(f"t_ab2/{grid}", config), problem, x, 10, config))


def test_runge_kutta_and_levels_of_ones_own():
    config = EULER(sigma_max=40.0, sigma_min=0.01).config
    problem, x = analytic.gaussian(), analytic.noise(16) * 40.0
    exact = problem.carried(x, (1.0, 40.0), (1.0, 0.0))
    ours = DEISScheduler.from_config(config, solver="rho_rk")
    assert analytic.rms(solve(ours, problem, x, 20, config) - exact) < 0.02
    ours = DEISScheduler.from_config(config)
    ours.set_timesteps(sigmas=[40.0, 10.0, 2.0, 0.3])
    assert torch.allclose(ours.sigmas, torch.tensor([40.0, 10.0, 2.0, 0.3, 0.0]))
    for wrong, sentence in (
        ({"timesteps": [0.9, 0.1]}, "an EDM model's timesteps follow from its noise levels"),
        ({"sigmas": [50.0, 1.0]}, "decrease from 40 at most"),
        ({"num_inference_steps": 0}, "must be 1 or more"),
    ):
        with pytest.raises(UserError, match=sentence):
            ours.set_timesteps(**wrong)


def test_the_last_step_to_sigma_min_moves():
    """diffusers' stands still there: its last level is listed twice."""
    config = EULER(final_sigmas_type="sigma_min").config
    ours = DEISScheduler.from_config(config)
    ours.set_timesteps(5)
    assert len(ours.timesteps) == 5 and (ours.sigmas.diff() < 0).all()
    assert float(ours.sigmas[-1]) == pytest.approx(0.002)


def test_dpm_solvers_config():
    theirs = diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.8)
    for config in (theirs.config, {**dict(theirs.config), "_class_name": "EDMDPMSolverMultistepScheduler"}):
        ours = DEISScheduler.from_config(config)
        assert ours.config.sigma_data == 0.8 and ours.config.sigma_max == 80.0
        ours.set_timesteps(6)
        theirs.set_timesteps(6)
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-5)


def test_noise_is_added_at_the_level_that_a_timestep_means():
    ours = DEISScheduler.from_config(EULER().config)
    x, n = torch.ones(2, 3), torch.full((2, 3), 2.0)
    noisy = ours.add_noise(x, n, torch.tensor([0.0, 0.25]))
    assert torch.allclose(noisy, torch.tensor([[3.0], [1 + 2 * 2.718281828]]).expand(2, 3))
