"""The config of diffusers' DEIS gives diffusers' DEIS."""

import diffusers
import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.samplers import DEISScheduler
from ptq4dm.samplers.catalog import make_sampler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLAGS = (None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def generate(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(1.5 * x + 0.003 * float(t)) + 0.3 * x, t, x).prev_sample
    return x


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_the_same_timesteps_and_samples(spacing, order, flag, tmp_path):
    """Saved and loaded, too. In float32 diffusers loses the digits of order 3 where its weights cancel (beta)."""
    options = {
        **SD,
        "timestep_spacing": spacing,
        "solver_order": order,
        "steps_offset": 1,
        **({flag: True} if flag else {}),
    }
    for lower in (True, False):
        theirs = diffusers.DEISMultistepScheduler(**options, lower_order_final=lower)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = DEISScheduler.from_config(theirs.config)
        ours.save_pretrained(tmp_path / "ours")
        loaded = (DEISScheduler.from_pretrained(tmp_path / name) for name in ("theirs", "ours"))
        for steps in (5, 10, 20):
            expected = generate(theirs, steps)
            for scheduler in (ours, *loaded):
                got = generate(scheduler, steps)
                assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
                assert relative(got, expected) < (1e-2 if order == 3 and flag == "use_beta_sigmas" else 5e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "v_prediction"},
        {"thresholding": True, "sample_max_value": 2.0},
        {"prediction_type": "sample"},
        {"trained_betas": [0.0001 * k for k in range(1, 301)], "num_train_timesteps": 300},
    ],
)
def test_other_fields_are_read_as_well(options):
    theirs = diffusers.DEISMultistepScheduler(**options)
    assert relative(generate(DEISScheduler.from_config(theirs.config), 10), generate(theirs, 10)) < 5e-5


def test_what_is_asked_for_goes_before():
    config = diffusers.DEISMultistepScheduler(use_karras_sigmas=True).config
    quad = DEISScheduler.from_config(config, timestep_grid="quad")
    assert (quad.config.solver, quad.config.order, quad.config.timestep_grid) == ("log_rho", 1, "quad")
    assert DEISScheduler.from_config(config, order=2).config.order == 2
    for solver in ("t_ab", "log_rho", "rho_rk"):  # a named solver comes with its own order and grid
        named = DEISScheduler.from_config(config, solver=solver)
        assert named.config.timestep_grid is None and named.config.order is None
    assert make_sampler("deis", config).config.solver == "t_ab"  # ours by that name; diffusers/deis is diffusers'


@pytest.mark.parametrize(
    "theirs",
    [diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler],
)
def test_configs_of_other_classes_give_our_defaults(theirs):
    ours = DEISScheduler.from_config(theirs(**SD).config)
    assert (ours.config.solver, ours.config.order, ours.config.timestep_grid) == ("t_ab", None, None)
    back = DEISScheduler.from_config(diffusers.DEISMultistepScheduler.from_config(theirs(**SD).config).config)
    assert back.config.solver == "log_rho"


def test_all_timesteps_and_too_many():
    ours = DEISScheduler.from_config(diffusers.DEISMultistepScheduler(timestep_spacing="leading").config)
    assert generate(ours, 1000).isfinite().all() and len(set(ours.timesteps.tolist())) == 1000
    with pytest.raises(UserError, match="more than the 1000 timesteps"):
        ours.set_timesteps(1001)
    with pytest.raises(UserError, match="'diffusers' goes with solver 'log_rho'"):
        DEISScheduler(solver="t_ab", timestep_grid="diffusers")
