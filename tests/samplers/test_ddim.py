"""DDIMScheduler against diffusers' and, where that one mistakes the next timestep, against the formula."""

import diffusers
import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler
from ptq4dm.samplers.maths.grids import GRIDS
from ptq4dm.samplers.maths.timesteps import own_index


def model(x, t):
    return torch.sin(1.5 * x + 0.003 * float(t)) + 0.3 * x


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generate(scheduler, steps, x, times=None, **kwargs):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps if times is None else times:
        x = scheduler.step(model(x, t), t, x, generator=generator, **kwargs).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_sample": False},
        {"clip_sample_range": 0.5, "set_alpha_to_one": False, "steps_offset": 1},
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"thresholding": True, "sample_max_value": 2.0, "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_is_diffusers_where_steps_divide_the_timesteps(options, eta, spacing):
    """Up to rounding: diffusers computes alpha_bar in float32."""
    x = noise(2, 3, 4, 4)
    for steps in (1, 10, 50):
        ours = generate(DDIMScheduler(timestep_spacing=spacing, **options), steps, x, eta=eta)
        theirs = generate(diffusers.DDIMScheduler(timestep_spacing=spacing, **options), steps, x, eta=eta)
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def formula(steps, times, x, eta):
    """arXiv:2010.02502, eq. 12 and 16, from each of `times` to the next and at last to clean data."""
    bars = diffusers.DDPMScheduler().alphas_cumprod.double()
    generator = torch.Generator().manual_seed(1)
    for now, then in zip(times, [*times[1:], None], strict=True):
        a, b = bars[now], torch.tensor(1.0).double() if then is None else bars[then]
        eps = model(x, now)
        deviation = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - deviation**2).sqrt() * eps
        if eta > 0:
            x = x + deviation * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 7), ("trailing", 61), ("linspace", 10)])
def test_goes_to_the_timestep_that_the_model_sees_next(spacing, steps, eta):
    """diffusers goes to t - N // n, here a little beside it."""
    options = {"timestep_spacing": spacing, "clip_sample": False}
    x = noise(2, 3).double()
    ours = generate(DDIMScheduler(**options), steps, x, eta=eta)
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    exact = formula(steps, scheduler.timesteps.tolist(), x, eta)
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    if steps != 61:  # where diffusers has one timestep too many, -1
        theirs = generate(diffusers.DDIMScheduler(**options), steps, x, eta=eta)
        assert (theirs - exact).abs().max() > 1e-3 * exact.abs().max()


@pytest.mark.parametrize("grid", GRIDS)
def test_timestep_grids(grid):
    scheduler = DDIMScheduler(timestep_grid=grid, clip_sample=False)
    x = noise(2, 3).double()
    ours = generate(scheduler, 9, x)
    exact = formula(9, scheduler.timesteps.tolist(), x, 0.0)
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    assert len(scheduler.timesteps) == 9 and scheduler.timesteps.dtype == torch.int64


def test_quad_grid_visits_the_squares():
    scheduler = DDIMScheduler(timestep_grid="quad")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [998, 642, 364, 164, 43]  # floor(((5 - i) sqrt(999) + i sqrt(0.1))^2 / 25)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_any_number_of_steps(spacing, offset):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in (1, 2, 3, 7, 61, 103, 333, 500, 700, 998, 999, 1000):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps
        assert len(times) == steps and (times.diff() < 0).all() and times[0] <= 999 and times[-1] >= 0
    x = generate(scheduler, 1000, noise(1, 3))
    assert x.isfinite().all()


@pytest.mark.parametrize(
    "form", [int, torch.clone, lambda t: t.reshape(1), lambda t: t.clone().reshape(1), lambda t: t.expand(2)]
)
def test_any_form_of_timestep(form):
    scheduler = DDIMScheduler(timestep_grid="edm")
    x = noise(2, 3)
    expected = generate(scheduler, 5, x)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), form(t), x).prev_sample
    assert torch.equal(x, expected)


def test_starting_in_the_middle_and_between_timesteps():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x, times = noise(2, 3), scheduler.timesteps.tolist()
    late = generate(scheduler, 10, x, scheduler.timesteps[4:])
    assert torch.allclose(late, formula(6, times[4:], x, 0.0), rtol=1e-4, atol=1e-4)
    between = scheduler.step(model(x, 450), 450, x).prev_sample  # goes to 400
    a, b = scheduler.alphas_cumprod[450], scheduler.alphas_cumprod[400]
    eps = model(x, 450)
    assert torch.allclose(between, b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps, atol=1e-5)


def test_other_arguments_of_step():
    """As in diffusers: use_clipped_model_output, variance_noise."""
    x, given = 3 * noise(2, 3), noise(2, 3, seed=2)
    ours, theirs = DDIMScheduler(), diffusers.DDIMScheduler()
    for s in (ours, theirs):
        s.set_timesteps(10)
    t = ours.timesteps[3]
    for kwargs in ({"use_clipped_model_output": True}, {"eta": 0.7, "variance_noise": given}):
        a, b = (s.step(model(x, t), t, x, **kwargs) for s in (ours, theirs))
        assert torch.allclose(a.prev_sample, b.prev_sample, atol=1e-6)
        assert torch.allclose(a.pred_original_sample, b.pred_original_sample, atol=1e-6)
    with pytest.raises(UserError, match="not both"):
        ours.step(model(x, t), t, x, eta=1.0, generator=torch.Generator(), variance_noise=given)


def test_half_precision_is_rounded_only_at_the_end_of_a_step():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x, eps, t = noise(8, 8).half(), noise(8, 8, seed=1).half(), scheduler.timesteps[0]
    half = scheduler.step(eps, t, x, return_dict=False)
    single = scheduler.step(eps.float(), t, x.float(), return_dict=False)
    assert all(torch.equal(h, s.half()) for h, s in zip(half, single, strict=True))


def test_generations_do_not_disturb_each_other():
    scheduler = DDIMScheduler(timestep_grid="quad")
    x, y = noise(2, 3), noise(4, 3, seed=1)
    alone = generate(scheduler, 5, x)
    for t in scheduler.timesteps:
        x, y = (scheduler.step(model(z, t), t, z).prev_sample for z in (x, y))
    assert torch.equal(x, alone)


def test_a_slice_in_place_of_the_timesteps():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    whole, x, y = scheduler.timesteps, noise(2, 3), noise(2, 3)
    for t in whole[3:]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    scheduler.timesteps = whole[3:]
    for t in scheduler.timesteps:
        y = scheduler.step(model(y, t), t, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_own_index_knows_its_views_and_nothing_else(dtype):
    times = torch.tensor([9, 7, 5, 3, 1], dtype=dtype)
    assert [own_index(t, times) for t in times] == [0, 1, 2, 3, 4]
    assert [own_index(t, times) for t in times[2:]] == [2, 3, 4]
    assert [own_index(t, times[2:]) for t in times[2:]] == [0, 1, 2]
    assert [own_index(t, times) for t in times[::2]] == [0, 2, 4]
    assert own_index(times[3].reshape(1).expand(4), times) == 3
    for foreign in (5, 5.0, times[2].clone(), times.clone()[2], times[2].float(), times.view(torch.int32)[2]):
        assert own_index(foreign, times) is None


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(UserError, match=f"from 1 to the 1000 timesteps .*not {steps}"):
        DDIMScheduler().set_timesteps(steps)


def test_unknown_choices():
    with pytest.raises(UserError, match="unknown timestep_grid 'square'"):
        DDIMScheduler(timestep_grid="square")
    with pytest.raises(UserError, match="unknown prediction_type 'noise'; choose from epsilon"):
        DDIMScheduler(prediction_type="noise")
    with pytest.raises(UserError, match="unknown beta_schedule 'laplace'; choose from linear"):
        DDIMScheduler.from_config(diffusers.DDPMScheduler(beta_schedule="laplace").config)
