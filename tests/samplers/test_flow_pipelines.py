"""Tiny pipelines of flow models, of diffusers' own classes: `from_config(pipe.scheduler.config)` samples them."""

import diffusers
import pytest
import torch

import models
import ptq4dm
from ptq4dm.cli.main import main
from ptq4dm.samplers import DEISScheduler

TEXT = [
    *("FluxPipeline", "Flux2Pipeline", "StableDiffusion3Pipeline", "QwenImagePipeline", "ZImagePipeline"),
    *("SanaPipeline", "LuminaPipeline", "Lumina2Pipeline", "AuraFlowPipeline", "CogView4Pipeline"),
    *("WanPipeline", "LTXPipeline", "HunyuanVideoPipeline", "MochiPipeline"),
]
IMAGE = ["FluxImg2ImgPipeline", "FluxInpaintPipeline", "StableDiffusion3Img2ImgPipeline"]


def pictures(output):
    """What a pipeline gave, as one tensor."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output.float()


# Whose random networks give a velocity that hardly changes: its polynomials are nearly constant, of any order.
STILL = ("HunyuanVideoPipeline", "MochiPipeline")


@pytest.mark.parametrize("name", [*TEXT, *IMAGE])
def test_order_0_is_the_pipelines_own_sampler_and_higher_orders_run(name, catalogue, one_thread):
    case = catalogue.PIPELINES[name]()
    own = case.pipe.scheduler
    expected = pictures(catalogue.run(case, [0]))
    case.pipe.scheduler = DEISScheduler.from_config(own.config, order=0, timestep_grid="diffusers")
    found = pictures(catalogue.run(case, [0]))
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    case.pipe.scheduler = DEISScheduler.from_config(own.config)
    higher = pictures(catalogue.run(case, [0]))
    least = 1e-6 if name in STILL else 1e-3
    assert higher.isfinite().all() and (higher - expected).abs().max() > least * expected.std()


@pytest.mark.parametrize("solver", ["t_ab", "rho_rk"])
def test_calibration_sees_the_samplers_own_times(solver, catalogue, one_thread):
    """The law of times is that of the scheduler's range, 0 to 1000, and a recorded call is at a step of its grid."""
    case = catalogue.PIPELINES["FluxPipeline"]()
    case.pipe.scheduler = DEISScheduler.from_config(case.pipe.scheduler.config, solver=solver)
    config = ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=3)
    store = ptq4dm.collect(case.pipe, config, conditioning=case.conditioning, pipeline_kwargs=case.pipeline_kwargs)
    grid = case.pipe.scheduler.timesteps.double() / 1000
    assert len(grid) == 3 * case.pipe.scheduler.order
    seen = torch.as_tensor(store.recorded().time).flatten()
    assert len(seen) == 2 and (seen[:, None] - grid).abs().amin(1).max() < 1e-4


def test_a_noise_level_stands_at_each_evaluation(catalogue, one_thread):
    """Wan's pipeline reads sigmas[i] beside timesteps[i]; so do those of Cosmos and LTX-2."""
    case = catalogue.PIPELINES["WanPipeline"]()
    case.pipe.scheduler = DEISScheduler.from_config(case.pipe.scheduler.config, solver="rho_rk")
    assert pictures(catalogue.run(case, [0])).isfinite().all()
    scheduler = case.pipe.scheduler
    assert scheduler.order == 3 and len(scheduler.timesteps) == 9
    torch.testing.assert_close(1000 * scheduler.sigmas[:-1], scheduler.timesteps)
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("sampler", ["deis", "ddim", "ipndm", "t_ab2/quad", "diffusers/unipc"])
def test_generate_takes_our_samplers_for_a_flow(sampler, tmp_path, one_thread):
    pipe = ptq4dm.PixelDiTPipeline(models.pixel_dit(), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipe.save_pretrained(tmp_path / "model")
    pictures = ["--num-images", "2", "--steps", "3", "--output", str(tmp_path / "out"), "--sampler", sampler]
    assert main(["generate", "--model", str(tmp_path / "model"), "--quiet", *pictures]) in (0, None)
    assert len(list((tmp_path / "out").glob("*.png"))) >= 2
