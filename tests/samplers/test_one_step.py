"""The one-step scheduler: its formula, the pipelines that it has to fit, and what it refuses."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

from models import pixel_dit
from ptq4dm.errors import UserError
from ptq4dm.pipelines.load import load_reference
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.pipelines.sampling import default_steps, sample
from ptq4dm.samplers import OneStepScheduler
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.comparison.compare import SamplerBench

pytestmark = pytest.mark.usefixtures("one_thread")


def by_formula(net, z, t, **extra):
    """The images of a generator, in [0, 1], from the schedule's definition."""
    a = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)[t]
    with torch.no_grad():
        eps = net(z, torch.full((len(z),), t), return_dict=False, **extra)[0]
    return ((z - (1 - a) ** 0.5 * eps) / a**0.5 / 2 + 0.5).clamp(0, 1).float()


def noise(seeds, size=8):
    return torch.cat([torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(s)) for s in seeds])


def test_the_default_timestep_is_where_sigma_over_alpha_is_nearest_to_2_5():
    scheduler = OneStepScheduler()
    a = scheduler.alphas_cumprod
    t = scheduler.config.generator_timestep
    ratio = ((1 - a) / a).sqrt()
    assert (
        t == 440
        and abs(ratio[t].log() - torch.tensor(2.5).log()) == (ratio.log() - torch.tensor(2.5).log()).abs().min()
    )
    assert scheduler.timesteps.tolist() == [440] and scheduler.init_noise_sigma == 1.0


def test_pipelines_take_one_step(unet):
    net, seeds = unet(), [3, 4]
    want = by_formula(net, noise(seeds), 440)
    pipe = DDPMPipeline(net, OneStepScheduler())
    assert default_steps(pipe, 50) == 1
    torch.testing.assert_close(sample(pipe, seeds, num_inference_steps=1), want, atol=1e-5, rtol=0)
    # DDIMPipeline makes a DDIMScheduler of it: its one step must be the same.
    other = DDIMPipeline(net, OneStepScheduler())
    assert type(other.scheduler) is DDIMScheduler
    torch.testing.assert_close(sample(other, seeds, num_inference_steps=1), want, atol=1e-5, rtol=0)
    # the stock call, without ptq4dm around it
    images = pipe(
        batch_size=2, num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, by_formula(net, z, 440), atol=1e-5, rtol=0)


def test_a_class_conditional_pipeline_takes_one_step():
    net = pixel_dit(out_channels=6)
    pipe = PixelDiTPipeline(net, OneStepScheduler(generator_timestep=300))

    def first_half(x, t, **extra):
        return (net(x, t, **extra)[0][:, :3],)

    labels = torch.tensor([3, 4])
    want = by_formula(first_half, noise([3, 4]), 300, class_labels=labels)
    torch.testing.assert_close(sample(pipe, [3, 4], num_inference_steps=1), want, atol=1e-5, rtol=0)


def test_the_embedded_student_repeats_itself():
    pipe = load_reference("unet-cifar10-onestep")
    assert type(pipe.scheduler) is OneStepScheduler and default_steps(pipe, 50) == 1
    images = sample(pipe, [0, 1], num_inference_steps=1)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all() and 0 <= images.min() < images.max() <= 1
    assert torch.equal(sample(pipe, [0, 1], num_inference_steps=1), images)
    torch.testing.assert_close(images, by_formula(pipe.unet, noise([0, 1], 32), 440), atol=1e-4, rtol=0)
    assert (images[0] - images[1]).square().mean() > 0.01  # of values in [0, 1]: two seeds are two pictures


def test_round_trip_of_the_config(tmp_path):
    scheduler = OneStepScheduler(beta_schedule="scaled_linear", beta_end=0.012, generator_timestep=321)
    scheduler.save_pretrained(tmp_path)
    for other in (OneStepScheduler.from_pretrained(tmp_path), OneStepScheduler.from_config(scheduler.config)):
        assert other.config.generator_timestep == 321 and torch.equal(other.alphas_cumprod, scheduler.alphas_cumprod)
        z = torch.randn(2, 3)
        assert torch.equal(
            other.step(z.sin(), 321, z).prev_sample, scheduler.step(z.sin(), 321, z, return_dict=False)[0]
        )


def test_low_precision_is_computed_in_float32():
    scheduler = OneStepScheduler()
    z, eps = (torch.randn(4, 3, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    got = scheduler.step(eps, 440, z).prev_sample
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, scheduler.step(eps.float(), 440, z.float()).prev_sample.bfloat16())


def test_what_it_refuses(unet):
    scheduler = OneStepScheduler()
    with pytest.raises(UserError, match="distilled to one step; ask for num_inference_steps=1"):
        scheduler.set_timesteps(50)
    with pytest.raises(UserError, match="unknown prediction_type 'trigflow'|TrigFlow"):
        OneStepScheduler(prediction_type="trigflow")
    with pytest.raises(UserError, match="from 0 to 999, not 1000"):
        OneStepScheduler(generator_timestep=1000)
    with pytest.raises(UserError, match="nothing but noise is left"):
        OneStepScheduler(generator_timestep=999, rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="takes no sampler but its own, so not 'deis'"):
        make_sampler("deis", scheduler.config)
    pipe = DDPMPipeline(unet(), scheduler)
    with pytest.raises(UserError, match="ask for num_inference_steps=1"):
        sample(pipe, [0], num_inference_steps=2)
    pipe.unet.register_to_config(sample_size=32)
    with pytest.raises(UserError, match="takes no sampler but its own"):
        SamplerBench().check(pipe)
