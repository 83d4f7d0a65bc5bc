"""Every scheduler of the installed diffusers: its config is sampled right, or refused by one sentence."""

import functools
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
from ptq4dm.samplers.kinds import EDM, FLOW, REFUSED, SHIFTED, TAKEN

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


@functools.cache
def made_once(name):
    return SCHEDULERS[name](**NEEDED.get(name, {}))


def made(name, **options):
    return made_once(name) if not options else SCHEDULERS[name](**NEEDED.get(name, {}), **options)


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
    assert set(SCHEDULERS) == (TAKEN | FLOW | EDM | SHIFTED | set(REFUSED)) & set(SCHEDULERS) and len(SCHEDULERS) > 40
    assert not (TAKEN | FLOW | EDM) & set(REFUSED)


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


def test_a_class_that_only_fields_tell_is_named_with_those_that_have_the_same():
    either = "cannot sample this model: LCMScheduler or TCDScheduler is for models distilled"
    with pytest.raises(UserError, match=either):
        DEISScheduler.from_config(diffusers.LCMScheduler().config)
    with pytest.raises(UserError, match="cannot sample this model: LCMScheduler is for models distilled"):
        DEISScheduler.from_config(in_file(diffusers.LCMScheduler()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
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
    for kind in (DDIMScheduler, OneStepScheduler) if "sigma_data" in field else (DDIMScheduler,):
        with pytest.raises(UserError, match="cannot sample this model"):
            kind(num_train_timesteps=1000, **field)
    with pytest.raises(TypeError, match="colour"):
        DEISScheduler(colour="pink")


def test_a_detour_over_another_scheduler_hides_nothing():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for config in forms(flow):
        detour = diffusers.DDIMScheduler.from_config(config)
        with pytest.raises(UserError, match="fields of flow matching beside prediction_type 'epsilon'"):
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


def test_diffusers_own_samplers_of_flows():
    theirs = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    for config in forms(theirs):
        ours = make_sampler("diffusers/dpm++2m", config)
        assert ours.config.use_flow_sigmas and ours.config.prediction_type == "flow_prediction"
        euler = make_sampler("diffusers/euler", config)
        assert isinstance(euler, diffusers.FlowMatchEulerDiscreteScheduler) and euler.config.shift == 3.0
        with pytest.raises(UserError, match="DDIMScheduler cannot sample"):
            make_sampler("diffusers/ddim", config)
        with pytest.raises(UserError, match="leave -karras out"):
            make_sampler("diffusers/unipc-karras", config)


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
