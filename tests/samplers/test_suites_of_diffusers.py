"""What diffusers' suites of DDIM, DEIS and flow-matching Euler and Heun ask, in our words; more: test_flow_steps."""

import diffusers
import pytest
import torch

from ptq4dm.samplers import DDIMScheduler, DEISScheduler

FLOW = {"prediction_type": "flow_prediction"}
KINDS = {
    "ddim": (DDIMScheduler, {}),
    "ddim quad": (DDIMScheduler, {"timestep_grid": "quad"}),
    "t_ab": (DEISScheduler, {}),
    "t_ab corrected": (DEISScheduler, {"corrector": True}),
    "ipndm": (DEISScheduler, {"solver": "ipndm"}),
    "rho_ab": (DEISScheduler, {"solver": "rho_ab"}),
    "log_rho": (DEISScheduler, {"solver": "log_rho"}),
    "diffusers' deis": (DEISScheduler, {"solver": "log_rho", "timestep_grid": "diffusers"}),
    "rho_rk": (DEISScheduler, {"solver": "rho_rk"}),
    "flow": (DEISScheduler, FLOW),
    "flow, epsilon": (DEISScheduler, {**FLOW, "integrand": "epsilon", "corrector": True}),
}
OPTIONS = (
    {"beta_schedule": "squaredcos_cap_v2"},
    *({"prediction_type": prediction} for prediction in ("v_prediction", "sample")),
    *({"beta_start": start, "beta_end": end} for start, end in ((0.001, 0.02), (0.01, 0.2))),
    *({"thresholding": True, "sample_max_value": most} for most in (0.5, 2.0)),
    *({"num_train_timesteps": number} for number in (25, 100, 999)),
)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def model(x, t):
    return 0.3 * torch.sin(x + 0.002 * float(t))


def noise(seed=0):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def generated(scheduler, steps=6, x=None, first=0, return_dict=True):
    scheduler.set_timesteps(steps)
    x = noise() if x is None else x
    for t in scheduler.timesteps[first:]:
        found = scheduler.step(model(x, t), t, x, return_dict=return_dict)
        x = found.prev_sample if return_dict else found[0]
    return x


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_saved_config_steps_to_the_same_bits_also_from_the_middle(kind, options, tmp_path):
    new, settings = kind
    if new(**settings).config.prediction_type == FLOW["prediction_type"]:
        options = {name: value for name, value in options.items() if name in ("num_train_timesteps", "thresholding")}
    scheduler = new(**{**settings, **options})
    scheduler.save_config(tmp_path)
    loaded = new.from_pretrained(tmp_path)
    for first in (0, 4 * scheduler.order):
        x = generated(scheduler, first=first)
        assert x.isfinite().all() and torch.equal(x, generated(loaded, first=first))


def test_a_tuple_and_an_output_say_the_same(kind):
    new, settings = kind
    assert torch.equal(generated(new(**settings)), generated(new(**settings), return_dict=False))


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 99])
def test_any_number_of_steps_begins_at_any_of_them(kind, steps):
    new, settings = kind
    if new is DDIMScheduler:  # else one step of it says that it leaves noise
        settings = {"timestep_spacing": "trailing", **settings}
    scheduler = new(**settings, num_train_timesteps=100)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) <= steps * scheduler.order and (scheduler.timesteps.diff() < 0).all()
    last = (len(scheduler.timesteps) - 1) // scheduler.order * scheduler.order
    for place in {0, last}:
        t, x = scheduler.timesteps[place], noise()
        assert scheduler.step(model(x, t), t, x).prev_sample.isfinite().all()
        assert scheduler.step(model(x, t), float(t), x).prev_sample.shape == x.shape


def test_steps_out_of_their_order_keep_the_shape(kind):
    new, settings = kind
    scheduler = new(**settings)
    scheduler.set_timesteps(8)
    x, by = noise(), scheduler.order
    results = [scheduler.step(0.1 * x, scheduler.timesteps[place * by], x).prev_sample for place in (5, 6, 2)]
    assert all(one.shape == x.shape and one.isfinite().all() for one in results)
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_image_to_image_is_that_of_diffusers_deis(order):
    """From the ninth of ten timesteps, on noise put on a picture."""
    theirs = diffusers.DEISMultistepScheduler(solver_order=order)
    ours, results = DEISScheduler.from_config(theirs.config), []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        begun = scheduler.add_noise(noise(1), noise(2), scheduler.timesteps[8:9])
        results.append(generated(scheduler, 10, begun, first=8))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_of_a_batch_of_times_and_their_places_are_those_of_flow_match_euler(shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = DEISScheduler.from_config(theirs.config, timestep_grid="diffusers")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(16)
    assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
    assert [ours.index_for_timestep(t) for t in ours.timesteps] == list(range(16))
    assert [ours.index_for_timestep(float(t)) for t in theirs.timesteps] == list(range(16))
    assert [theirs.index_for_timestep(t) for t in theirs.timesteps] == list(range(16))
    x, n = torch.rand(4, 3, 2, 2), torch.rand(4, 3, 2, 2)
    noised = [one.scale_noise(x, one.timesteps[[0, 3, 9, 15]], n) for one in (ours, theirs)]
    torch.testing.assert_close(*noised)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_at_its_own_levels_is_flow_match_heun(shift):
    """Two evaluations a step, one for the last: `rho_rk` of velocities with Heun's method."""
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    config = {**theirs.config, "_class_name": type(theirs).__name__}  # FlowMapEuler's has the same fields
    ours = DEISScheduler.from_config(config, solver="rho_rk", rk_method="2heun")
    theirs.set_timesteps(7)
    ours.set_timesteps(timesteps=theirs.timesteps.unique().flip(0))
    assert torch.allclose(ours.timesteps.float(), theirs.timesteps)
    x = y = noise()
    for s, t in zip(ours.timesteps, theirs.timesteps, strict=True):
        x = ours.step(model(x, t), s, x).prev_sample
        y = theirs.step(model(y, t), t, y).prev_sample
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
