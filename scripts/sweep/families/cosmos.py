"""Video by Cosmos."""

from __future__ import annotations

import diffusers as d
import torch
from families.base import (
    EULER,
    Builders,
    Case,
    make,
    picture,
    prompted,
    text,
    tiny,
    wan_vae,
)
from families.video_more import FEW, WIDE

COSMOS = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,  # to make the mask, diffusers wants torchvision
    "extra_pos_embed_type": "learnable",
}


class Unchecked(torch.nn.Module):
    """A safety checker that finds everything safe: the real one is a large model of its own."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: object) -> object:
        return video


def cosmos_vae():
    config = {"latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8), "attention_resolutions": (8,)}
    config |= {"decode_block_out_channels": (8, 8, 8, 8), "resolution": 64, "num_layers": 2, "patch_size": 4}
    config |= {"spatial_compression_ratio": 4, "temporal_compression_ratio": 4, "patch_type": "haar"}
    return tiny(d.AutoencoderKLCosmos, **config)


def cosmos(
    kind, channels, *, first=False, scheduler=None, conditioning=None, alone=False, size=FEW, **kwargs
) -> Case:
    own = {"in_channels": channels, "out_channels": 4} if first else {"in_channels": channels}
    default = d.EDMEulerScheduler(final_sigmas_type="sigma_min", sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    later = EULER(use_karras_sigmas=True)
    pipe = make(
        kind,
        transformer=tiny(d.CosmosTransformer3DModel, **COSMOS | own),
        vae=cosmos_vae() if first else wan_vae(),
        scheduler=scheduler or (default if first else later),
        safety_checker=Unchecked(),
        **text(),
    )
    return Case(pipe, conditioning or prompted(), size | kwargs, alone)


PIPELINES: Builders = {
    "CosmosTextToWorldPipeline": lambda: cosmos(d.CosmosTextToWorldPipeline, 4, first=True),
    "CosmosVideoToWorldPipeline": lambda: cosmos(
        d.CosmosVideoToWorldPipeline, 5, first=True, alone=True, image=picture(32)
    ),
    "Cosmos2TextToImagePipeline": lambda: cosmos(
        d.Cosmos2TextToImagePipeline, 16, size=WIDE | {"max_sequence_length": 16}
    ),
    "Cosmos2VideoToWorldPipeline": lambda: cosmos(d.Cosmos2VideoToWorldPipeline, 17, alone=True, image=picture(32)),
}
