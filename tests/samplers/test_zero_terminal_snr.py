"""Epsilon where only noise is left: refused, unless a grid and clipping keep away from there."""

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler
from ptq4dm.samplers.catalog import make_sampler

ZERO = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}


def trained_to_zero():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return rescale_zero_terminal_snr(betas).tolist()


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
