"""One call of a pipeline in which image k depends on seeds[k] alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DiTPipeline,
    EulerDiscreteScheduler,
    ImagePipelineOutput,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from models import dit, unet
from ptq4dm.errors import UserError
from ptq4dm.pipelines import sampling
from ptq4dm.pipelines.denoiser import denoiser, denoiser_name
from ptq4dm.pipelines.images import to_uint8
from ptq4dm.pipelines.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_unet(channels=3, **config):
    return unet(in_channels=channels, out_channels=channels, block_out_channels=(8, 8), **config)


def tiny_dit():
    transformer = dit(num_layers=1, sample_size=4, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4)
    return DiTPipeline(transformer, vae.eval(), DDIMScheduler())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, UniPCMultistepScheduler])
def test_each_image_depends_on_its_own_seed_only(scheduler):
    # float64, so that the order of summation (it changes with the batch) cannot reach a grey level.
    pipe = DDPMPipeline(tiny_unet().double(), scheduler())
    together = sample(pipe, [5, 6, 7], num_inference_steps=3)
    assert together.shape == (3, 3, 8, 8) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1 and together.std() > 0.05
    torch.manual_seed(99)  # the global generator plays no part
    apart = torch.cat([sample(pipe, [s], num_inference_steps=3) for s in (7, 5)])
    assert torch.equal(to_uint8(together[[2, 0]]), to_uint8(apart))
    assert not torch.equal(together[0], together[1])


def test_agrees_with_the_plain_pipeline_call():
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    ours = to_uint8(sample(pipe, [3], num_inference_steps=4))[0].permute(1, 2, 0).numpy()
    theirs = pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=4).images[0]
    assert (ours == theirs).all()


def test_one_seed_starts_the_same_noise_in_every_dtype():
    class Noise(DDPMPipeline):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            # 3*5*5 is no multiple of 16, where PyTorch's float16 noise is not its float32 noise.
            shape = (len(generator), 3, 5, 5)
            noise = randn_tensor(shape, generator=generator, dtype=self.unet.dtype)
            return ImagePipelineOutput(images=noise)

    exact = sample(Noise(tiny_unet(), DDIMScheduler()), [1, 2], num_inference_steps=1)
    half = sample(Noise(tiny_unet().half(), DDIMScheduler()), [1, 2], num_inference_steps=1)
    assert torch.equal(exact.half().float(), half)


class Halves(DDPMPipeline):
    """In float16, of a size where float16 noise is not float32 noise; meets the other threads before it draws."""

    meeting = None

    def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
        self.meeting.wait(timeout=60)
        images = [randn_tensor((len(generator), 3, 5, 5), generator=generator, dtype=torch.float16)]
        self.meeting.wait(timeout=60)
        images.append(randn_tensor((len(generator), 3, 5, 5), generator=generator, dtype=torch.float16))
        return ImagePipelineOutput(images=torch.cat(images, 2))


def test_threads_sample_what_each_samples_alone(monkeypatch):
    """While they sample together, a thread that calls diffusers itself gets its own noise."""
    here = sys.modules[__name__]
    monkeypatch.setattr(Halves, "meeting", threading.Barrier(1))
    pipes = [Halves(tiny_unet(), DDIMScheduler()) for _ in range(3)]
    plain = pipes[2](generator=[torch.Generator().manual_seed(2)]).images
    alone = [sample(pipe, [seed], num_inference_steps=1) for seed, pipe in enumerate(pipes[:2])]
    monkeypatch.setattr(Halves, "meeting", threading.Barrier(3))
    with ThreadPoolExecutor(3) as pool:
        together = [pool.submit(sample, pipe, [seed], num_inference_steps=1) for seed, pipe in enumerate(pipes[:2])]
        beside = pool.submit(pipes[2], generator=[torch.Generator().manual_seed(2)])
    assert all(torch.equal(one.result(), other) for one, other in zip(together, alone, strict=True))
    assert torch.equal(beside.result().images, plain)
    exact = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(2)).half()
    assert not torch.equal(plain[:, :, :5], exact)  # or the thread beside them would prove nothing
    assert here.randn_tensor is sys.modules["diffusers.utils.torch_utils"].randn_tensor


def test_threads_leave_nothing_behind():
    """Uneven numbers of steps, so that each is in another's middle; then two threads take turns at one pipeline."""
    module = sys.modules[DDPMPipeline.__module__]
    own, shared = module.randn_tensor, DDPMPipeline(tiny_unet(), DDPMScheduler())

    def work(pipe, seed):
        return [sample(pipe, [seed], num_inference_steps=1 + k % 3) for k in range(6)]

    def pipes():
        return [DDPMPipeline(tiny_unet(), DEISMultistepScheduler()) for _ in range(2)] + [shared, shared]

    with ThreadPoolExecutor(1) as pool:
        alone = list(pool.map(work, pipes(), range(4)))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, pipes(), range(4)))
    assert len(together) == 4 and all(
        torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(together, alone, strict=True)
    )
    assert module.randn_tensor is own and "step" not in vars(shared.scheduler)


def test_sigma_space_scheduler_is_refused_where_the_pipeline_cannot_drive_it():
    pipe = DDPMPipeline(tiny_unet(), EulerDiscreteScheduler())
    with pytest.raises(UserError, match="EulerDiscreteScheduler"):
        sample(pipe, [0], num_inference_steps=2)


def test_leaves_the_pipeline_as_it_was():
    pipe = DDPMPipeline(tiny_unet().train(), DEISMultistepScheduler())
    pipe.unet.mid_block.eval()
    pipe.set_progress_bar_config(desc="mine")
    sample(pipe, [0], num_inference_steps=2)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert pipe.unet.training and not pipe.unet.mid_block.training and pipe.unet.conv_in.training
    assert "step" not in vars(pipe.scheduler)


def test_inner_progress_bar_only_on_request(capsys, monkeypatch):
    monkeypatch.setattr(sampling, "bars_shown", lambda: True)  # as in a terminal
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler())
    sample(pipe, [0], num_inference_steps=2)
    assert "2/2" not in capsys.readouterr().err
    sample(pipe, [0], num_inference_steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_dropout_is_off_while_sampling():
    pipe = DDPMPipeline(tiny_unet(dropout=0.5).train(), DDIMScheduler())
    assert torch.equal(sample(pipe, [0], num_inference_steps=2), sample(pipe, [0], num_inference_steps=2))


def test_latent_dit_takes_labels_by_seed_and_guidance():
    pipe = tiny_dit()
    default = sample(pipe, [1, 2], num_inference_steps=2, pipeline_kwargs={"guidance_scale": 1.0})
    asked = {"class_labels": [9, 1, 2]}  # seeds 1 and 2 choose entries 1 and 2: labels 1 and 2
    same = sample(pipe, [1, 2], num_inference_steps=2, conditioning=asked, pipeline_kwargs={"guidance_scale": 1.0})  # noqa: E501  # fmt: skip
    guided = sample(pipe, [1, 2], num_inference_steps=2, conditioning=asked)
    other = sample(pipe, [1, 2], num_inference_steps=2, conditioning={"class_labels": [5]})
    assert torch.equal(default, same)
    assert not torch.equal(same, guided) and not torch.equal(guided, other)


class Echo(DiffusionPipeline):
    """A stand-in for text-to-image pipelines: a picture as bright as its prompt is long."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(
        self, prompt=None, prompt_embeds=None, generator=None, num_inference_steps=50,
        num_images_per_prompt=1, output_type="pil",
    ):  # fmt: skip
        if prompt_embeds is not None:
            return ImagePipelineOutput(images=prompt_embeds.reshape(-1, 1, 1, 1))
        images = torch.tensor([len(p) / 10 for p in prompt for _ in range(num_images_per_prompt)])
        return ImagePipelineOutput(images=images.reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2))


def test_text_to_image_pipelines():
    pipe = Echo(tiny_unet(), DDIMScheduler())
    images = sample(pipe, [0, 1, 2], num_inference_steps=1, conditioning={"prompt": ["a", "abc"]})
    assert torch.allclose(images[:, 0, 0, 0], torch.tensor([0.1, 0.3, 0.1]))
    embeds = sample(pipe, [3], num_inference_steps=1, conditioning={"prompt_embeds": torch.tensor([0.0, 0.5])})
    assert embeds.shape == (1, 3, 1, 1) and (embeds == 0.5).all()  # a grey picture becomes RGB
    with pytest.raises(UserError, match="needs a prompt"):
        sample(pipe, [0], num_inference_steps=1)
    with pytest.raises(UserError, match="one picture per seed"):
        sample(
            pipe, [0], num_inference_steps=1, conditioning={"prompt": "abc"},
            pipeline_kwargs={"num_images_per_prompt": 2},
        )  # fmt: skip
    pipe.video_processor = None  # as pipelines of videos have
    with pytest.raises(UserError, match="Echo makes videos"):
        sample(pipe, [0], num_inference_steps=1, conditioning={"prompt": "abc"})


def test_nan_names_the_seed_and_the_count():
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler())
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"2 of 2 images .*seed 41"):
        sample(pipe, [41, 42], num_inference_steps=2)


@pytest.mark.parametrize(
    ("seeds", "steps", "options", "message"),
    [
        ([], 2, {}, "at least one seed"),
        ([0], 0, {}, "at least one step"),
        ([0], 2, {"pipeline_kwargs": {"wings": 2}}, "no argument 'wings'"),
        ([0], 2, {"pipeline_kwargs": {"generator": None}}, "'generator' cannot"),
        ([0], 2, {"conditioning": {"prompt": ["a"]}}, "takes no 'prompt'"),
    ],
)
def test_wrong_input(seeds, steps, options, message):
    with pytest.raises(UserError, match=message):
        sample(DDPMPipeline(tiny_unet(), DDIMScheduler()), seeds, num_inference_steps=steps, **options)


def test_denoiser():
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler())
    assert denoiser_name(pipe) == "unet" and denoiser(pipe) is pipe.unet
    assert denoiser_name(tiny_dit()) == "transformer"
    with pytest.raises(UserError, match="no network that takes a timestep"):
        denoiser(object())


def test_more_steps_than_the_model_was_trained_with():
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler(num_train_timesteps=10))
    with pytest.raises(UserError, match="11 steps are more than the 10"):
        sample(pipe, [0], num_inference_steps=11)


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": float("nan")}, {"prediction_type": "noise"}, {"timestep_spacing": "leadin"},
        {"timestep_spacing": 1000}, {"steps_offset": 0.5}, {"steps_offset": "1"},
    ],
)  # fmt: skip
def test_a_scheduler_that_cannot_count_is_told_with_its_file(config):
    """diffusers takes any value in its configuration, and fails when it samples."""
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler(**config))
    with pytest.raises(UserError, match=r"cannot sample as it is configured \(scheduler_config.json\)"):
        sample(pipe, [0], num_inference_steps=2)


def test_what_fails_elsewhere_while_sampling_is_no_fault_of_the_scheduler(monkeypatch):
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler())
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: {}["x"])
    with pytest.raises(KeyError):
        sample(pipe, [0], num_inference_steps=2)
