"""Every scheduler of the installed diffusers: its config is sampled right, or refused by one sentence."""

import importlib
import inspect
import pkgutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import schedulers
from diffusers.configuration_utils import ConfigMixin, FrozenDict

from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler, OneStepScheduler
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.configs import REFUSED, SHIFTED, TAKEN

NEEDED = {
    "AmusedScheduler": {"mask_token_id": 9},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
    "RFD4ProteinaScheduler": {
        **{name: 1.0 for name in ("tsr_k", "tsr_sigma", "tail_steps", "tail_step_multiplier", "t_lim_ode")},
        **{"schedule_mode": "log", "noise_mode": "tan", "t_lim_ode_below": True},
    },
}
MEAN, STD = 0.5, 0.2


def all_schedulers():
    found = {}
    for module in pkgutil.walk_packages(schedulers.__path__, schedulers.__name__ + "."):
        try:
            names = vars(importlib.import_module(module.name))
        except ImportError:  # two of them need torchsde
            continue
        mine = (kind for kind in names.values() if inspect.isclass(kind) and kind.__module__ == module.name)
        found.update({kind.__name__: kind for kind in mine if issubclass(kind, ConfigMixin)})
    return found


SCHEDULERS = all_schedulers()


def made(name, **options):
    return SCHEDULERS[name](**NEEDED.get(name, {}), **options)


def in_file(scheduler):
    """The config as a saved pipeline has it: with the class's name, without the note of what was a default."""
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return {**config, "_class_name": type(scheduler).__name__}


def forms(scheduler):
    """In memory, as a plain dict, from a file, and with a field that nobody knows."""
    return [
        *(scheduler.config, dict(scheduler.config), in_file(scheduler), FrozenDict(in_file(scheduler))),
        {**in_file(scheduler), "noise_colour": "pink"},
    ]


def distance_from_the_data(sampler, alphas_cumprod, steps=100):
    """Of the samples' mean and deviation, for the exact model of N(MEAN, STD^2) on the other scheduler's schedule."""
    sampler.set_timesteps(steps)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in sampler.timesteps:
        a = float(np.interp(float(t), np.arange(len(alphas_cumprod)), alphas_cumprod))
        x0 = MEAN + a**0.5 * STD**2 * (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a)
        x = sampler.step((x - a**0.5 * x0) / (1 - a) ** 0.5, t, x).prev_sample
    return max(abs(float(x.mean()) - MEAN), abs(float(x.std()) - STD))


def test_every_class_is_decided_on():
    assert set(SCHEDULERS) == (TAKEN | SHIFTED | set(REFUSED)) & set(SCHEDULERS) and len(SCHEDULERS) > 40
    assert not TAKEN & set(REFUSED)


@pytest.mark.parametrize("name", sorted(TAKEN & set(SCHEDULERS)))
@pytest.mark.parametrize("kind", [DEISScheduler, DDIMScheduler])
def test_what_is_taken_is_sampled_right(kind, name):
    for config in forms(made(name)):
        ours = kind.from_config(config)
        betas = made(name).betas.double().numpy()
        assert np.abs(ours.betas.numpy() - betas).max() < 1e-6 * betas.max()
    # Heun's and KDPM2's defaults are other betas than DDPM's: a distance of 0.1 with those.
    assert distance_from_the_data(ours, np.cumprod(1 - betas)) < 0.02


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(SCHEDULERS)))
def test_what_is_refused_says_why_and_what_to_take(name):
    for config in forms(made(name)):
        for make in (
            DEISScheduler.from_config,
            DDIMScheduler.from_config,
            OneStepScheduler.from_config,
            lambda c: make_sampler("deis", c),
            lambda c: make_sampler("ddim", c),
            lambda c: make_sampler("t_ab3/quad", c),
            lambda c: make_sampler("diffusers/unipc", c),
        ):
            with pytest.raises(UserError, match=r"cannot sample this model: .* is for .*; keep the pipeline's own"):
                make(config)
    with pytest.raises(UserError, match="cannot sample this model: .*Scheduler is for"):
        DEISScheduler(**in_file(made(name)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True}),
        ("SASolverScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True}),
        ("CogVideoXDDIMScheduler", {}),
        ("CogVideoXDPMScheduler", {"snr_shift_scale": 2.0}),
        ("UnCLIPScheduler", {"variance_type": "learned_range"}),
        ("IPNDMScheduler", {"trained_betas": [0.1] * 1000}),
    ],
)
def test_fields_tell_where_the_class_does_not(name, options):
    for config in forms(made(name, **options)):
        for kind in (DEISScheduler, DDIMScheduler):
            with pytest.raises(UserError, match="cannot sample this model"):
                kind.from_config(config)


@pytest.mark.parametrize("field", [{"shift": 3.0}, {"sigma_data": 0.5}, {"prediction_type": "flow_prediction"}])
def test_init_refuses_what_it_sees(field):
    for kind in (DEISScheduler, DDIMScheduler, OneStepScheduler):
        with pytest.raises(UserError, match="cannot sample this model"):
            kind(num_train_timesteps=1000, **field)
    with pytest.raises(TypeError, match="colour"):
        DEISScheduler(colour="pink")


def test_a_detour_over_another_scheduler_hides_nothing():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for config in forms(flow):
        detour = diffusers.DDIMScheduler.from_config(config)
        with pytest.raises(UserError, match="shift=3.0 is for flow matching"):
            DEISScheduler.from_config(detour.config)


def test_classes_that_are_not_diffusers():
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    for config in (
        {"_class_name": "FlowUniPCScheduler", **betas},
        {"_class_name": ["somewhere", "MyLCMScheduler"], **betas},
        {"_class_name": "MySampler", "num_train_timesteps": 1000},
    ):
        with pytest.raises(UserError, match="keep the pipeline's own scheduler"):
            DEISScheduler.from_config(config)
    assert DEISScheduler.from_config({"_class_name": "MySampler", **betas}).config.beta_end == 0.02


def test_cogvideox_without_a_shift_is_an_ordinary_schedule():
    theirs = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0, clip_sample=False)
    for config in forms(theirs):
        ours = DDIMScheduler.from_config(config)
        assert torch.allclose(ours.alphas_cumprod.double(), theirs.alphas_cumprod.double(), atol=1e-6)
        assert distance_from_the_data(ours, theirs.alphas_cumprod.double().numpy()) < 0.02


def test_diffusers_own_samplers_keep_the_flow_that_they_understand():
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    for config in forms(theirs):
        ours = make_sampler("diffusers/dpm++2m", config)
        assert ours.config.use_flow_sigmas and ours.config.prediction_type == "flow_prediction"
        with pytest.raises(UserError, match="EulerDiscreteScheduler cannot sample"):
            make_sampler("diffusers/euler", config)


# ---- epsilon where only noise is left

ZERO = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}


def trained_to_zero():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return schedulers.scheduling_ddim.rescale_zero_terminal_snr(betas).tolist()


@pytest.mark.parametrize("betas", [ZERO, {"trained_betas": trained_to_zero()}], ids=["flag", "betas"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: DDIMScheduler(**o, timestep_spacing="trailing", clip_sample=False),
        lambda o: DDIMScheduler(**o, timestep_spacing="trailing", clip_sample=True),
        lambda o: DDIMScheduler(**o, clip_sample=False),
        lambda o: DDIMScheduler(**o, timestep_grid="quad"),
        lambda o: DEISScheduler(**o),
        lambda o: DEISScheduler(**o, solver="ipndm"),
        lambda o: DEISScheduler(**o, use_karras_sigmas=True),
        lambda o: DEISScheduler.from_config(diffusers.DDIMScheduler(**o).config),
        lambda o: make_sampler("ddim", diffusers.DPMSolverMultistepScheduler(**o).config),
    ],
)
def test_epsilon_says_nothing_of_an_image_in_pure_noise(make, betas):
    with pytest.raises(UserError, match="only noise is left, where a prediction of epsilon says nothing"):
        make(betas)
    for kind in ("v_prediction", "sample"):
        sampler = make({**betas, "prediction_type": kind})
        sampler.set_timesteps(4)
        assert sampler.step(torch.ones(1, 3), sampler.timesteps[0], torch.ones(1, 3)).prev_sample.isfinite().all()


def test_clipped_ddim_below_the_last_timestep_is_left_to_diffusers_ways():
    sampler = DDIMScheduler(**ZERO)  # "leading", clipped
    sampler.set_timesteps(50)
    assert sampler.timesteps[0] < 999
    with pytest.raises(UserError, match="only noise is left"):
        sampler.set_timesteps(1000)


def test_small_is_not_zero():
    """The cosine schedule ends at an alpha_bar of 2e-9, and models are trained there."""
    for kind in (DDIMScheduler, DEISScheduler):
        assert 0 < float(kind(beta_schedule="squaredcos_cap_v2").alphas_cumprod[-1]) < 1e-8


# ---- clipping


@pytest.mark.parametrize("name", sorted(TAKEN & set(SCHEDULERS)))
def test_clipping_is_on_only_where_the_config_has_it_on(name):
    for config in forms(made(name)):
        assert DDIMScheduler.from_config(config).config.clip_sample == bool(config.get("clip_sample"))
    detour = DEISScheduler.from_config(made(name).config)
    assert DDIMScheduler.from_config(detour.config).config.clip_sample == bool(config.get("clip_sample"))


def test_clipping_can_be_asked_for_and_old_files_mean_their_classs_default():
    assert DDIMScheduler.from_config(diffusers.PNDMScheduler().config, clip_sample=True).config.clip_sample
    assert DDIMScheduler.from_config({"_class_name": "DDPMScheduler", "beta_schedule": "linear"}).config.clip_sample
    assert not DDIMScheduler.from_config({"beta_schedule": "linear"}).config.clip_sample


# ---- learned variance


@pytest.mark.parametrize("kind", [DEISScheduler, DDIMScheduler, OneStepScheduler])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1, 4, 4), (1, 4, 2, 4, 4), (3, 5)])
def test_a_learned_variance_is_left_out(kind, shape):
    config = diffusers.DDPMScheduler(variance_type="learned_range").config
    sampler = kind.from_config(config)
    sampler.set_timesteps(1 if kind is OneStepScheduler else 3)
    x = y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for t in sampler.timesteps:
        output = torch.cat([torch.sin(x), torch.full_like(x, 7.0)], 1)
        x = sampler.step(output, t, x).prev_sample
        output.fill_(float("nan"))  # a static buffer that the next call writes over
    for t in sampler.timesteps:
        y = sampler.step(torch.sin(y), t, y).prev_sample
    assert torch.equal(x, y) and x.isfinite().all()
    for wrong in ((shape[0], 3 * shape[1], *shape[2:]), (2 * shape[0], *shape[1:]), (1, *shape[1:], 1)):
        with pytest.raises(UserError, match="they must agree, or the output have twice the channels"):
            sampler.step(torch.zeros(wrong), sampler.timesteps[0], torch.zeros(shape))
