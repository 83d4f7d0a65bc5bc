"""From a teacher's pipeline to its one-step student's: what can be distilled, and how the result is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDPMPipeline
from torch import nn

from ...errors import UserError
from ...files.result_folder import result_folder
from ...layers.base import holds_quantized
from ...pipelines.denoiser import denoiser, denoiser_name, foreign_inputs
from ..choices import FLOW
from ..configs import kind_of, refuse_foreign
from ..one_step import OneStepScheduler, nearest_timestep

RECORD = "distillation.json"  # beside model_index.json: teacher and settings

CARD = """---
library_name: diffusers
base_model: {model}
---
`{model}`, distilled to one step by ptq4dm. How is in `distillation.json`.

    import ptq4dm  # makes diffusers know the one-step scheduler
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("this folder, or its name on the hub")
    images = pipe(num_inference_steps=1).images
"""

SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def one_step_scheduler(pipe, generator_sigma: float) -> OneStepScheduler:
    """The scheduler of a student of this pipeline, whose generator runs where sigma / alpha is nearest to that.

    Raises:
        UserError: the teacher is a student itself, has no discrete variance-preserving noise schedule that its config
            describes and does no flow matching either, or its pipeline does not scale what a flow's student is given.
    """
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    name = type(scheduler).__name__
    if "generator_timestep" in config:
        raise UserError("this model is a one-step student already; distil its teacher.")
    refuse_foreign(config, "OneStepScheduler", name, OneStepScheduler.takes)
    if kind_of(config, name)[0] == "flow":
        if isinstance(pipe, DDPMPipeline | DDIMPipeline):
            raise UserError(f"{type(pipe).__name__} does not scale its input as a flow's student needs it.")
        ours = OneStepScheduler(num_train_timesteps=config["num_train_timesteps"], prediction_type=FLOW)
        t = nearest_timestep(ours.shares(), generator_sigma)
        return OneStepScheduler.from_config(ours.config, generator_timestep=t)
    if config.get("beta_schedule") == "continuous" or not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"distillation needs a teacher with discrete DDPM timesteps; {name} has none here.")
    a = scheduler.alphas_cumprod.double().numpy()
    known = {key: config[key] for key in (*SCHEDULE, "prediction_type") if key in config}
    ours = OneStepScheduler(**known, generator_timestep=nearest_timestep(a, generator_sigma))
    if ours.alphas_cumprod.shape != scheduler.alphas_cumprod.shape or not torch.allclose(
        ours.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6
    ):
        raise UserError(
            f"the noise schedule that {name} computes is not the one that its config describes; give the teacher a "
            "plain DDPM or DDIM scheduler on the schedule that it was trained with."
        )
    trained = denoiser(pipe).config.get("num_train_timesteps")
    if trained is not None and trained != len(a):
        raise UserError(f"the teacher was trained with {trained} timesteps but its scheduler has {len(a)}.")
    return ours


def check_network(pipe) -> None:
    """Raises UserError unless the denoiser maps pixels, a timestep and perhaps a class label to a prediction."""
    net, name = denoiser(pipe), type(pipe).__name__
    if getattr(pipe, "vae", None) is not None:
        raise UserError(f"{name} works on latents; distillation here is for pixel models such as unet-cifar10.")
    if holds_quantized(net):
        raise UserError("the teacher is quantized; distil the model in full precision, then quantize the student.")
    if net.dtype != torch.float32:
        raise UserError(f"the teacher is loaded in {net.dtype}; load it in float32, and choose precision 'bf16'.")
    if foreign := foreign_inputs(pipe):
        raise UserError(
            f"{type(net).__name__} needs {', '.join(foreign)}; distillation is for unconditional and "
            "class-conditional models."
        )


def image_shape(pipe) -> tuple[int, int, int]:
    """(channels, height, width) of what the denoiser works on."""
    config = denoiser(pipe).config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def student_pipeline(pipe, net: nn.Module, scheduler: OneStepScheduler):
    """The teacher's pipeline with the student in it.

    DDIMPipeline would turn the scheduler into a DDIMScheduler (which takes the same single step, but any other
    number of them too): its student becomes a DDPMPipeline.
    """
    kind = DDPMPipeline if isinstance(pipe, DDIMPipeline) else type(pipe)
    return kind(**{**pipe.components, denoiser_name(pipe): net, "scheduler": scheduler})


def save_student(pipe, record: dict, folder: Path) -> None:
    """Save a student's pipeline with what made it (`record`, with the teacher's name as "model") and a card."""
    with result_folder(folder, RECORD, record) as new:
        pipe.save_pretrained(new)
        (new / "README.md").write_text(CARD.format(**record), encoding="utf-8")
