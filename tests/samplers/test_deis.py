"""What one generation with DEISScheduler computes: against diffusers' schedulers, and in its own terms."""

import diffusers
import pytest
import torch

from ptq4dm.samplers import DEISScheduler, choices, plan
from ptq4dm.samplers.maths.coefficients import RUNGE_KUTTA

SOLVERS = {
    f"{name}{k}": {"solver": name, "order": k} for name in choices.DEFAULTS if name != "rho_rk" for k in range(4)
}
SOLVERS |= {f"rho_rk-{name}": {"solver": "rho_rk", "rk_method": name} for name in RUNGE_KUTTA}
ORDER_0 = ["t_ab0", "rho_ab0", "ipndm0", "log_rho0", "rho_rk-1euler"]


def model(x, t):
    """A stand-in for a denoiser: smooth, no two timesteps alike."""
    return torch.sin(1.5 * x + 0.003 * float(t)) + 0.3 * x


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def generate(scheduler, steps, x, predict=model, first=0):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def predict_as(kind, scheduler):
    """The same noise prediction, told as v or as x_0."""

    def predict(x, t):
        a = float(scheduler.schedule.alpha_bar(float(t)))
        alpha, sigma, eps = a**0.5, (1 - a) ** 0.5, model(x, t)
        x0 = (x - sigma * eps) / alpha
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]

    return predict


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_prediction_types_agree(name, clean):
    outputs = {}
    for kind in choices.PREDICTIONS:
        scheduler = DEISScheduler(prediction_type=kind, final_denoise=clean, **SOLVERS[name])
        outputs[kind] = generate(scheduler, 6, noise(2, 3), predict_as(kind, scheduler))
    assert relative(outputs["v_prediction"], outputs["epsilon"]) < 1e-9
    assert relative(outputs["sample"], outputs["epsilon"]) < 1e-9


@pytest.mark.parametrize("name", ORDER_0)
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(("schedule", "first"), [("linear", 0), ("scaled_linear", 0), ("squaredcos_cap_v2", 1)])
def test_order_0_is_ddim(name, clean, schedule, first):
    """Where 20 divides 1000; diffusers' alphas are float32. The last schedule's first alpha_bar, 2e-9, is clipped."""
    options = {"beta_schedule": schedule, "timestep_spacing": "trailing", "clip_sample": False}
    theirs = diffusers.DDIMScheduler(set_alpha_to_one=clean, **options)
    ours = DEISScheduler(beta_schedule=schedule, timestep_grid="trailing", final_denoise=clean, **SOLVERS[name])
    x = noise(2, 3)
    assert relative(generate(ours, 20, x, first=first), generate(theirs, 20, x, first=first)) < 2e-6


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("steps", [4, 14, 15, 20])
def test_log_rho_is_diffusers_deis(steps, lower_order_final, order, spacing):
    """diffusers works its coefficients out in float32, where those of order 3 lose a digit."""
    options = {"lower_order_final": lower_order_final, "solver_order": order}
    theirs = diffusers.DEISMultistepScheduler(timestep_spacing=spacing, **options)
    ours = DEISScheduler(solver="log_rho", timestep_grid=spacing, **options)
    x = noise(2, 3, dtype=torch.float32)
    assert relative(generate(ours, steps, x), generate(theirs, steps, x)) < (5e-5 if order == 3 else 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ],
)
def test_options_mean_what_they_mean_in_diffusers(options):
    theirs = diffusers.DEISMultistepScheduler(**options)
    ours = DEISScheduler(solver="log_rho", timestep_grid="linspace", **options)
    x = noise(2, 3, 4, 4, dtype=torch.float32)
    assert relative(generate(ours, 10, x), generate(theirs, 10, x)) < 1e-5


@pytest.mark.parametrize("name", SOLVERS)
def test_lower_order_final_concerns_log_rho_alone(name):
    outputs = [generate(DEISScheduler(lower_order_final=on, **SOLVERS[name]), 8, noise(2, 3)) for on in (False, True)]
    assert torch.equal(*outputs) == (name not in ("log_rho1", "log_rho2", "log_rho3"))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_sample_keeps_its_dtype(name):
    """Half-precision samples are moved in float32 and rounded once a step."""
    scheduler = DEISScheduler(**SOLVERS[name])
    exact = generate(scheduler, 5, noise(2, 3))
    assert exact.dtype == torch.float64
    for dtype, error in ((torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.3)):
        output = generate(scheduler, 5, noise(2, 3, dtype=dtype))
        assert output.dtype == dtype and relative(output.double(), exact) < error


def test_half_precision_is_rounded_only_at_the_end_of_a_step():
    scheduler = DEISScheduler(solver="t_ab", order=0)
    scheduler.set_timesteps(10)
    x, eps = noise(4, 3, dtype=torch.float16), noise(4, 3, dtype=torch.float16).flip(0)
    t = scheduler.timesteps[0]
    half, single = (scheduler.step(eps.to(d), t, x.to(d)).prev_sample for d in (torch.float16, torch.float32))
    assert torch.equal(half, single.half())


def test_coefficients_are_worked_out_in_set_timesteps(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("worked out in a step")

    for name in ("t_ab3", "rho_rk-4rk"):
        scheduler = DEISScheduler(**SOLVERS[name])
        expected = generate(scheduler, 5, noise(2, 3))
        with monkeypatch.context() as patch:
            for function in ("multistep_rule", "make_grid", "multistep", "runge_kutta"):
                patch.setattr(plan, function, fail)
            x = noise(2, 3)
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t), t, x).prev_sample
        assert torch.equal(x, expected)


@pytest.mark.parametrize("name", ["ipndm2", "t_ab3", "rho_ab2", "log_rho1"])
def test_final_denoise_ends_at_clean_data_at_the_same_cost(name):
    """A model that knows the only image of its data set: the end is that image, else it has noise of sigma(0)."""
    image = noise(2, 3).clamp(-1, 1)

    def knows(x, t):
        a = float(DEISScheduler().schedule.alpha_bar(float(t)))
        return (x - a**0.5 * image) / (1 - a) ** 0.5

    ends = {}
    for clean in (False, True):
        scheduler = DEISScheduler(final_denoise=clean, **SOLVERS[name])
        ends[clean] = generate(scheduler, 10, noise(2, 3).flip(0), knows)
        assert len(scheduler.timesteps) == 10
    assert (ends[True] - image).abs().max() < 1e-9
    assert 1e-4 < (ends[False] - image).abs().max() < 0.05


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_runge_kutta_timesteps(method):
    """Stages in each step; ending at clean data, the last step is one evaluation: none may be at rho = 0."""
    stages = len(RUNGE_KUTTA[method][0])
    scheduler = DEISScheduler(solver="rho_rk", rk_method=method, timestep_grid="edm")
    plain = DEISScheduler(solver="ipndm", timestep_grid="edm")
    plain.set_timesteps(6)
    scheduler.set_timesteps(6)
    assert scheduler.order == stages and len(scheduler.timesteps) == 6 * stages
    assert scheduler.timesteps[::stages].tolist() == plain.timesteps.tolist()
    assert (scheduler.timesteps.diff() <= 0).all() and scheduler.timesteps.min() >= 0
    scheduler = DEISScheduler(solver="rho_rk", rk_method=method, timestep_grid="edm", final_denoise=True)
    scheduler.set_timesteps(6)
    assert len(scheduler.timesteps) == 5 * stages + 1 and scheduler.timesteps[-1] == plain.timesteps[-1]


def test_thresholding_keeps_x0_in_range():
    """At order 0 the last step ends at the predicted x_0 itself."""
    options = {"solver": "t_ab", "order": 0, "timestep_grid": "quad", "final_denoise": True}
    x = noise(2, 3, 8, 8)
    plain = generate(DEISScheduler(**options), 5, x)
    bounded = generate(DEISScheduler(thresholding=True, sample_max_value=1.5, **options), 5, x)
    assert plain.abs().max() > 10 and 0.5 < bounded.abs().max() <= 1 + 1e-9


def test_the_rest_of_the_interface_is_diffusers():
    scheduler, ddpm = DEISScheduler(), diffusers.DDPMScheduler()
    x, n = noise(3, 2, 4, 4, dtype=torch.float32), noise(3, 2, 4, 4, dtype=torch.float32).flip(0)
    t = torch.tensor([0, 500, 999])
    assert torch.allclose(scheduler.add_noise(x, n, t), ddpm.add_noise(x, n, t), atol=1e-6)
    assert torch.allclose(scheduler.get_velocity(x, n, t), ddpm.get_velocity(x, n, t), atol=1e-6)
    assert scheduler.add_noise(x.half(), n.half(), t).dtype == torch.float16
    assert torch.allclose(scheduler.betas, ddpm.betas)
    assert torch.allclose(scheduler.alphas_cumprod, ddpm.alphas_cumprod)
    assert scheduler.scale_model_input(x, t[0]) is x
    assert scheduler.init_noise_sigma == 1 and len(scheduler) == 1000 and scheduler.order == 1
    scheduler.set_timesteps(4)
    (result,) = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    assert torch.equal(result, scheduler.step(x, scheduler.timesteps[0], x).prev_sample)


@pytest.mark.parametrize("solver", choices.DEFAULTS)
def test_defaults_are_the_solvers_best(solver):
    order, grid = choices.DEFAULTS[solver]
    order = {} if order is None else {"order": order}
    named = DEISScheduler(solver=solver, timestep_grid=grid, **order)
    assert torch.equal(generate(DEISScheduler(solver=solver), 7, noise(2, 3)), generate(named, 7, noise(2, 3)))


def test_zero_terminal_snr():
    """A v-model on a schedule that ends in pure noise: as diffusers' DDIM with the same config."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    ours = DEISScheduler(**config, solver="t_ab", order=0, timestep_grid="trailing", final_denoise=True)
    theirs = diffusers.DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing")
    assert float(ours.alphas_cumprod[-1]) == pytest.approx(0.0, abs=1e-7)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        x = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(results[0], results[1], atol=2e-3, rtol=0)  # ours is clipped to alpha_bar 1e-7 there
