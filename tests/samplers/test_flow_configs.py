"""Configs of flow-matching and EDM schedulers, as diffusers' pipelines have them: taken as they are meant."""

import math

import diffusers
import numpy as np
import pytest
import torch

import analytic
from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler
from ptq4dm.samplers.catalog import make_sampler

EULER = diffusers.FlowMatchEulerDiscreteScheduler
FLOWS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
LAWS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_dynamic_shifting": True, "use_beta_sigmas": True},
    "inverted": {"invert_sigmas": True},
    "fewer": {"num_train_timesteps": 500},
}


def in_file(scheduler):
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return {**config, "_class_name": type(scheduler).__name__}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("given", ["steps", "sigmas", "sigmas and timesteps"])
def test_levels_and_timesteps_are_diffusers(law, given):
    theirs = EULER(**LAWS[law])
    mu = {"mu": 0.8} if theirs.config.use_dynamic_shifting else {}
    trained = theirs.config.num_train_timesteps
    asked = {"sigmas": [1.0, 0.8, 0.3, 0.05], "timesteps": [trained * s for s in (0.999, 0.7, 0.3, 0.02)]}
    asked = {"num_inference_steps": 7} if given == "steps" else {k: asked[k] for k in given.split(" and ")}
    theirs.set_timesteps(**asked, **mu)
    for config in (theirs.config, dict(theirs.config), in_file(theirs)):
        ours = DEISScheduler.from_config(config, timestep_grid="diffusers")
        ours.set_timesteps(**asked, **mu)
        assert ours.timesteps.dtype == torch.float32 and ours.config.prediction_type == "flow_prediction"
        assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-5)
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-7)
        again = EULER.from_config(ours.config)  # and back: nothing is lost
        assert all(again.config[key] == value for key, value in theirs.config.items() if key[0] != "_")


@pytest.mark.parametrize("law", LAWS)
def test_order_0_is_the_pipelines_own_sampler(law):
    theirs = EULER(**LAWS[law])
    ours = DDIMScheduler.from_config(theirs.config, timestep_grid="diffusers")
    assert isinstance(ours, DEISScheduler) and ours.config.order == 0
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(6, mu=0.5)
        x = analytic.noise(4).float()
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x + 0.002 * t), t, x, return_dict=False)[0]
        results.append(x)
    assert torch.allclose(*results, atol=2e-5)


def test_the_default_grid_spends_no_evaluation_beside_clean_data():
    ours = DEISScheduler.from_config(EULER(shift=3.0).config)
    ours.set_timesteps(4)
    even = np.array([1, 0.75, 0.5, 0.25])
    assert np.allclose(ours.sigmas[:-1].numpy(), 3 * even / (1 + 2 * even)) and ours.sigmas[-1] == 0


@pytest.mark.parametrize("grid", ["quad", "cubic"])
def test_a_grid_by_name_takes_the_place_of_even_levels_only(grid):
    """Pipelines pass 1, ..., 1 / n where the user names no levels; other levels are the user's own."""
    ours = DEISScheduler.from_config(EULER(shift=2.0).config, timestep_grid=grid)
    ours.set_timesteps(5)
    expected = ours.sigmas
    ours.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    assert torch.equal(ours.sigmas, expected)
    own = [1.0, 0.9, 0.5, 0.3, 0.1]
    ours.set_timesteps(sigmas=own)
    assert torch.allclose(ours.sigmas[:-1], torch.tensor([2 * s / (1 + s) for s in own]))


def test_timesteps_alone_are_taken_as_they_are():
    ours = DEISScheduler.from_config(EULER(shift=3.0).config)
    ours.set_timesteps(timesteps=[1000, 600, 250.5])
    assert ours.timesteps.tolist() == [1000, 600, 250.5]
    assert torch.allclose(ours.sigmas, torch.tensor([1, 0.6, 0.2505, 0]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DPMSolverMultistepScheduler", FLOWS),
        ("UniPCMultistepScheduler", FLOWS),
        ("DEISMultistepScheduler", FLOWS),
        ("SASolverScheduler", {**FLOWS}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_every_class_of_flows_gives_the_same_model(kind, options):
    config = in_file(getattr(diffusers, kind)(**options))
    problem, x = analytic.gaussian(), analytic.noise(8)
    exact = problem.carried(x, (0, 1), (1, 0))
    for make in (DEISScheduler.from_config, DDIMScheduler.from_config, lambda c: make_sampler("ipndm", c)):
        ours = make(config)
        assert ours.config.shift == 3.0 and ours.config.prediction_type == "flow_prediction"
        ours.set_timesteps(60)
        assert analytic.rms(analytic.solve_flow(ours, problem, x) - exact) < 0.05


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        ("SASolverScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True}),
    ],
)
def test_a_flow_that_predicts_epsilon_is_refused(name, options):
    scheduler = getattr(diffusers, name)(**options)
    for config in (scheduler.config, in_file(scheduler)):
        for kind in (DEISScheduler, DDIMScheduler):
            with pytest.raises(UserError, match="fields of flow matching beside prediction_type 'epsilon'"):
                kind.from_config(config)


def test_names_say_what_the_polynomials_are_of():
    config = EULER(shift=2.0).config
    for integrand in ("epsilon", "velocity"):
        ours = make_sampler(f"ipndm2/quad/{integrand}", config)
        assert (ours.config.integrand, ours.config.order, ours.config.timestep_grid) == (integrand, 2, "quad")
    with pytest.raises(UserError, match="integrand 'velocity' is of flow-matching models"):
        make_sampler("ipndm2/quad/velocity", diffusers.DDIMScheduler().config)


def test_saved_and_loaded(tmp_path):
    for config in (in_file(EULER(shift=3.0)), in_file(diffusers.EDMEulerScheduler())):
        ours = DEISScheduler.from_config(config, solver="ipndm", order=1)
        ours.save_pretrained(tmp_path)
        loaded = DEISScheduler.from_pretrained(tmp_path)
        assert all(loaded.config[key] == value for key, value in ours.config.items() if key[0] != "_")
        ours.set_timesteps(5), loaded.set_timesteps(5)
        assert torch.equal(ours.sigmas, loaded.sigmas)


WRONG = [
    ({"num_inference_steps": 0}, "must be 1 or more"),
    ({}, "needs num_inference_steps, or sigmas or timesteps"),
    ({"sigmas": [0.5, 0.8]}, "decrease from 1 at most and end above 0"),
    ({"sigmas": [1.0, 0.5, 0.0]}, "decrease from 1 at most and end above 0"),
    ({"sigmas": [2.0, 0.5]}, "decrease from 1 at most"),
    ({"sigmas": ["a"]}, "sigmas must be a list of numbers"),
    ({"sigmas": 0.5}, "must be lists of numbers"),
    ({"timesteps": [1001.0, 3.0]}, "timesteps must be a list of numbers that decrease from 1000"),
    ({"sigmas": [1.0, 0.5], "timesteps": [999.0]}, "2 sigmas do not go with 1 timesteps"),
    ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "num_inference_steps is 3, and 2 sigmas"),
]


@pytest.mark.parametrize(("asked", "sentence"), WRONG)
def test_wrong_levels_are_one_sentence(asked, sentence):
    with pytest.raises(UserError, match=sentence):
        DEISScheduler(prediction_type="flow_prediction").set_timesteps(**asked)


def test_dynamic_shifting_needs_mu():
    with pytest.raises(UserError, match="pass mu to set_timesteps"):
        DEISScheduler.from_config(EULER(use_dynamic_shifting=True).config).set_timesteps(4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shift": 3.0}, "shift is of flow-matching models"),
        ({"integrand": "velocity"}, "integrand 'velocity' is of flow-matching"),
        ({"prediction_type": "flow_prediction", "integrand": "x0"}, "unknown integrand of solver 't_ab'"),
        ({"prediction_type": "flow_prediction", "solver": "rho_rk", "integrand": "epsilon"}, "choose from velocity"),
        ({"prediction_type": "flow_prediction", "shift": 0.0}, "shift must be above 0"),
        ({"prediction_type": "flow_prediction", "timestep_grid": "linspace"}, "unknown timestep_grid of a flow"),
        ({"prediction_type": "flow_prediction", "shift_terminal": 1.0}, "shift_terminal must be from 0 to below 1"),
    ],
)
def test_wrong_options_are_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        DEISScheduler(**options)


# ---- models with alpha_bar, by times of one's own


def test_align_your_steps():
    """Stable Diffusion's table of arXiv:2404.14507, at the timesteps that it names."""
    table = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    ours = DEISScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver="rho_ab")
    ours.set_timesteps(timesteps=table)
    assert ours.timesteps.tolist() == table and ours.num_inference_steps == 10
    problem, x = analytic.gaussian(), analytic.noise(8)
    alpha_bar = analytic.discrete_alpha_bar(ours.schedule.alphas_cumprod)
    exact = problem.flow(x, alpha_bar(999), alpha_bar(0))
    error = analytic.rms(analytic.solve(ours, problem, alpha_bar, x) - exact)
    ours.set_timesteps(10)
    assert error < 0.12
    for wrong in ([999, 0], [10.5, 3], [1200, 3]):
        with pytest.raises(UserError, match="timesteps"):
            ours.set_timesteps(timesteps=wrong)
    with pytest.raises(UserError, match="sigmas are of flow-matching and EDM models"):
        ours.set_timesteps(sigmas=[1.0, 0.5])


@pytest.mark.parametrize("mu", [1000.0, -1000.0, 1e300, 60.0, -60.0])
def test_a_mu_that_leaves_no_levels_is_told(mu):
    """The exponential of mu is the shift: of -1 it is 0.37, and right."""
    config = EULER(use_dynamic_shifting=True).config
    ours = DEISScheduler.from_config(config)
    with pytest.raises(UserError, match="must be from -100 to 100|moves noise levels to one place"):
        ours.set_timesteps(4, mu=mu)
    ours.set_timesteps(4, mu=-1.0)
    assert float(ours.sigmas[1]) == pytest.approx(0.75 / (0.75 + 0.25 * math.e))
    with pytest.raises(UserError, match="'linear' mu must be above 0; got -1"):
        DEISScheduler.from_config({**config, "time_shift_type": "linear"}).set_timesteps(4, mu=-1.0)


@pytest.mark.parametrize("shift", [1e300, 1e-300])
def test_a_shift_that_leaves_no_levels_is_told(shift):
    ours = DEISScheduler.from_config(EULER(shift=2.0).config, shift=shift)
    with pytest.raises(UserError, match="moves noise levels to one place"):
        ours.set_timesteps(4)
