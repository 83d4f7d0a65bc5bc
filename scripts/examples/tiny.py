"""A tiny pipeline with random weights, for pages on small models; large_models.py has those of large classes."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel


def unet() -> DDPMPipeline:
    """An unconditional pipeline of 8x8 pictures."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return DDPMPipeline(model.eval(), DDIMScheduler())
