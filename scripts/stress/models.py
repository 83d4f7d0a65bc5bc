"""The tiny pipelines that files are made of: with one seed the same weights at every call."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiTTransformer2DModel, UNet2DModel

import ptq4dm

CALIBRATION = ptq4dm.CalibrationConfig(num_samples=4, num_inference_steps=2, num_bins=2, batch_size=2)


KEPT = ("pos_embed.proj",)  # of tiny_dit, the convolution, which files of others do not hold in few bits


def tiny_unet(size: int = 8) -> DDPMPipeline:
    """An unconditional pixel pipeline of a dozen layers."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    return quiet(DDPMPipeline(unet.eval(), DDIMScheduler(clip_sample=True)))


def tiny_dit(width: int = 64) -> ptq4dm.PixelDiTPipeline:
    """A class-conditional one of one block, in multiples of 64 as 4-bit formats take it."""
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=3, out_channels=3, num_layers=1,
        sample_size=4, patch_size=2, num_embeds_ada_norm=4,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in dit.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return quiet(ptq4dm.PixelDiTPipeline(dit.eval(), DDIMScheduler(clip_sample=True)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
