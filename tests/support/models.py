"""Tiny denoisers of diffusers in evaluation mode: with one seed the same random weights on every call."""

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import nn

UNET = dict(
    sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
    attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
PLAIN = dict(
    block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False
)
CONDITIONAL = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(12, 20), norm_num_groups=4,
    attention_head_dim=4, cross_attention_dim=12, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
ADDED = dict(
    block_out_channels=(8,), cross_attention_dim=8, down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",), addition_embed_type="text_time", addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=32,
)  # fmt: skip
DIT = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
    num_embeds_ada_norm=10,
)  # fmt: skip
PIXEL_DIT = dict(in_channels=3, out_channels=3, num_layers=1, patch_size=2)


def unet(seed=0, **config):
    """UNet with attention, [B, 3, 8, 8]; `config` changes what it is built with, here and below."""
    torch.manual_seed(seed)
    return UNet2DModel(**UNET | config).eval()


def plain_unet(seed=0, **config):
    """UNet of one level without attention, [B, 3, 8, 8]: some 4,000 weights."""
    return unet(seed, **PLAIN | config)


def conditional_unet(seed=0, **config):
    """UNet that looks at a text [B, L, 12], [B, 4, 8, 8]."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**CONDITIONAL | config).eval()


def added_unet(seed=0, **config):
    """UNet of one level that is fed a text [B, L, 8] and SDXL's added conditions, [B, 4, 8, 8]."""
    return conditional_unet(seed, **ADDED | config)


def dit(seed=0, **config):
    """DiT of ten classes with a learned variance, [B, 4, 8, 8] -> [B, 8, 8, 8]."""
    torch.manual_seed(seed)
    return DiTTransformer2DModel(**DIT | config).eval()


def pixel_dit(seed=0, **config):
    """DiT of one layer in pixel space, [B, 3, 8, 8]."""
    return dit(seed, **PIXEL_DIT | config)


class InPlace(nn.Module):
    """`act` changes what `first` gave, and that is used again: the change would be missed if `act` were not run."""

    config = {}

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x, timestep=None):
        kept = self.first(x)
        active = self.act(kept)
        return self.third(self.second(active)) + kept
