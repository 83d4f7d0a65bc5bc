"""Tiny pipelines with random weights: what the examples run on where no real model is at hand."""

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


def flux() -> tuple:
    """(a FluxPipeline of one double and one single block without text encoders, prompts as embeddings)."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, None, None, transformer.eval())
    return pipe, {"prompt_embeds": torch.randn(2, 8, 64), "pooled_prompt_embeds": torch.randn(2, 64)}
