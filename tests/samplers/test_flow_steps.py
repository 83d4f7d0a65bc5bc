"""What diffusers' suites ask of a scheduler, for flow and EDM models: steps, copies, starts, noise, places."""

import copy
import pickle

import diffusers
import numpy as np
import pytest
import torch

import analytic
from ptq4dm.errors import UserError
from ptq4dm.samplers import DEISScheduler

FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}
SCHEDULERS = {
    "t_ab": {**FLOW, "solver": "t_ab", "order": 3},
    "t_ab velocity": {**FLOW, "solver": "t_ab", "integrand": "velocity"},
    "ipndm": {**FLOW, "solver": "ipndm", "order": 2},
    "rho_ab": {**FLOW, "solver": "rho_ab", "integrand": "epsilon"},
    "log_rho": {**FLOW, "solver": "log_rho"},
    "rho_rk": {**FLOW, "solver": "rho_rk"},
    "inverted": {**FLOW, "invert_sigmas": True},
    "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
}


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    found = DEISScheduler(**SCHEDULERS[request.param])
    found.set_timesteps(6)
    return found


def model(x, t):
    return torch.sin(1.5 * x + 0.003 * float(t)) - 0.2 * x


def noise(seed=0, shape=(2, 3, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def advance(scheduler, x, timesteps):
    for t in timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def test_step_keeps_shape_dtype_and_form(scheduler):
    t = scheduler.timesteps[0]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = noise().to(dtype)
        found = scheduler.step(model(x, t), t, x)
        plain = scheduler.step(model(x, t), t, x, return_dict=False)
        assert found.prev_sample.shape == x.shape and found.prev_sample.dtype == dtype
        assert isinstance(plain, tuple) and torch.equal(plain[0], found.prev_sample)


def test_the_sample_that_was_given_is_left_as_it_is(scheduler):
    t, x = scheduler.timesteps[0], noise()
    scheduler.step(model(x, t), t, x)
    assert torch.equal(x, noise())


def test_two_generations_in_turn_do_not_know_of_each_other(scheduler):
    alone = [advance(scheduler, noise(seed), scheduler.timesteps) for seed in (0, 1)]
    x, y = noise(0), noise(1)
    for t in scheduler.timesteps:
        x, y = advance(scheduler, x, [t]), advance(scheduler, y, [t])
    assert torch.equal(x, alone[0]) and torch.equal(y, alone[1])


def test_static_buffers(scheduler):
    """One tensor for every sample and one for every output, as in a loop over a CUDA graph."""
    expected = advance(scheduler, noise(), scheduler.timesteps)
    x, output = noise(), torch.empty(2, 3, 4, 4)
    for t in scheduler.timesteps:
        output.copy_(model(scheduler.scale_model_input(x, t), t))
        x.copy_(scheduler.step(output, t, x).prev_sample)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("form", [float, lambda t: t.clone(), lambda t: t.reshape(1)], ids=["number", "copy", "[1]"])
def test_any_form_of_timestep(scheduler, form):
    expected, x = advance(scheduler, noise(), scheduler.timesteps), noise()
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, form(t)), t), form(t), x).prev_sample
    assert torch.equal(x, expected)


def test_saved_loaded_and_copied(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    twins = [DEISScheduler.from_pretrained(tmp_path), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    twins[0].set_timesteps(6)
    expected = advance(scheduler, noise(), scheduler.timesteps)
    for twin in twins:
        assert torch.equal(advance(twin, noise(), twin.timesteps), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_any_number_of_steps_ends_at_clean_data(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = noise() * float(scheduler.init_noise_sigma)
    assert advance(scheduler, x, scheduler.timesteps).isfinite().all()
    assert float(scheduler.sigmas[-1]) == (1.0 if scheduler.config.invert_sigmas else 0.0)


def test_pure_noise_and_the_end_are_exact_of_a_one_point_model(scheduler):
    """x_0 = 0.3 always: every solver ends there, from any noise, to the last bit of its arithmetic."""
    if scheduler.config.sigma_data is not None:
        pytest.skip("test_edm.py has the exact models of EDM")
    x, sign = noise().double(), -1 if scheduler.config.invert_sigmas else 1
    levels = dict(zip(scheduler._times, scheduler._evaluations, strict=True))
    for t in scheduler.timesteps:
        x = scheduler.step(sign * (x - 0.3) / levels[float(t)].sigma, t, x).prev_sample
    assert (x - 0.3).abs().max() < 1e-9


# ---- starts in the middle, and noise


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_image_to_image_begins_where_diffusers_does(strength):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DEISScheduler.from_config(theirs.config, order=0)
    sigmas = np.linspace(1, 1 / 10, 10)
    image, n = noise(3), noise(4)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas)
        begin = int(10 - 10 * strength)
        scheduler.set_begin_index(begin)
        times = scheduler.timesteps[begin:]
        x = scheduler.scale_noise(image, times[:1].repeat(2), n)
        for t in times:
            x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        results.append(x)
    assert torch.allclose(*results, atol=1e-5)


def test_a_start_in_the_middle_is_of_lower_order_first(scheduler):
    start = max(2, scheduler.order)
    x = advance(scheduler, noise(), scheduler.timesteps[start:])
    scheduler.set_begin_index(start)
    assert scheduler.begin_index == start
    assert torch.equal(x, advance(scheduler, noise(), scheduler.timesteps[start:]))


def test_nothing_left_to_sample_is_one_sentence():
    scheduler = DEISScheduler(**FLOW)
    scheduler.set_timesteps(6)
    with pytest.raises(UserError, match="with 6 steps a strength must be 0.17 or more"):
        scheduler.set_begin_index(6)


def test_noise_and_its_inverse(scheduler):
    """x = alpha x_0 + sigma n at each timestep of the grid, and n is what is left."""
    x, n = noise(5), noise(6)
    for t, at in zip(scheduler._times, scheduler._evaluations, strict=True):
        times = torch.tensor([t, t])
        noisy = scheduler.add_noise(x, n, times)
        assert torch.allclose(noisy, at.alpha * x + at.sigma * n, atol=1e-4 * (1 + at.sigma))
        assert torch.allclose((noisy - at.alpha * x) / at.sigma, n, atol=1e-3 / min(1, at.sigma))
        assert torch.equal(scheduler.scale_noise(x, times, n), noisy)


def test_the_target_of_training():
    x, n = noise(5), noise(6)
    assert torch.equal(DEISScheduler(**FLOW).get_velocity(x, n, torch.tensor([500.0, 20.0])), n - x)


def test_index_for_timestep(scheduler):
    for i, t in enumerate(scheduler.timesteps):
        if scheduler._evaluations[i].starts:
            assert scheduler.index_for_timestep(t) == i == scheduler.index_for_timestep(float(t))
    with pytest.raises(UserError, match="call set_timesteps"):
        DEISScheduler(**FLOW).index_for_timestep(3.0)


def test_parts_of_a_sample_at_other_times_are_refused(scheduler):
    with pytest.raises(UserError, match="all parts of a sample at one time"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), per_token_timesteps=torch.ones(3))


# ---- the model's own output


def test_dynamic_thresholding_bounds_clean_data():
    scheduler = DEISScheduler(**FLOW, order=0, thresholding=True)
    scheduler.set_timesteps(8)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(5 * model(x, t), t, x).prev_sample
    assert x.abs().max() <= 1 + 1e-5


def test_a_learned_variance_behind_the_velocity_is_left_out(scheduler):
    t, x = scheduler.timesteps[0], noise()
    output = model(x, t)
    doubled = torch.cat([output, torch.ones_like(output)], 1)
    expected = scheduler.step(output, t, x).prev_sample
    assert torch.equal(scheduler.step(doubled, t, x).prev_sample, expected)


def test_levels_that_the_model_is_told_otherwise():
    """CogView4's pipeline: whole timesteps for the model, shifted levels for the solver."""
    scheduler = DEISScheduler(**FLOW)
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3], timesteps=[1000, 700, 300])
    assert scheduler.timesteps.tolist() == [1000, 700, 300]
    problem, x, sigmas = analytic.gaussian(), analytic.noise(4), scheduler.sigmas.double()
    y = x
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(problem.velocity(y, float(sigmas[i])), t, y).prev_sample
    scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3])
    assert analytic.rms(y - analytic.solve_flow(scheduler, problem, x)) < 1e-5
