"""Transformers of video of Wan's kind, and temporal attention."""

from __future__ import annotations

import torch

from .case import Draw, Table
from .transformers_video import HEADS, WAN, clip, steered

WANS = Table()
add = WANS.add

SKY = WAN | {"qk_norm": "rms_norm_across_heads"}
add("SkyReelsV2Transformer3DModel", SKY, clip)
add(
    "SkyReelsV2Transformer3DModel",
    SKY | {"inject_sample_info": True},
    lambda d: clip(Draw(1, d.seed), timestep=d.steps(2)[:1], enable_diffusion_forcing=True, fps=d.integers(2)[:1]),
    "diffusion forcing",
)
add(
    "TransformerTemporalModel",
    HEADS | {"in_channels": 32, "num_layers": 2, "norm_num_groups": 8},
    lambda d: {"hidden_states": d.normal(32, 4, 4).repeat(2, 1, 1, 1), "num_frames": 2},
)
NAME = "WanTransformer3DModel"
add(NAME, WAN, clip)
add(NAME, WAN, lambda d: clip(d, timestep=d.steps(32)), "a time for each token")
add(
    NAME,
    WAN | {"in_channels": 8, "image_dim": 64, "added_kv_proj_dim": 64, "pos_embed_seq_len": None},
    lambda d: steered(d, hidden_states=d.normal(8, 2, 8, 8)),
    "image",
)
add(
    "WanVACETransformer3DModel",
    WAN | {"vace_layers": [0, 1], "vace_in_channels": 12},
    lambda d: clip(d, control_hidden_states=d.normal(12, 2, 8, 8)),
)
add(
    "WanAnimateTransformer3DModel",
    WAN
    | {"in_channels": 12, "latent_channels": 4, "image_dim": 64, "added_kv_proj_dim": 64}
    | {"motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16}
    | {"motion_style_dim": 64, "motion_dim": 4, "motion_encoder_dim": 64, "face_encoder_hidden_dim": 64}
    | {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2},
    lambda d: steered(
        d,
        hidden_states=d.normal(12, 3, 8, 8),
        pose_hidden_states=d.normal(4, 2, 8, 8),
        face_pixel_values=d.normal(3, 5, 16, 16),
    ),
)


def animate2(d: Draw) -> dict:
    """The pass over the reference; one sample. It fills a new cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [d.alone(4, 2, 4, 4)],
        "timestep": d.steps()[:1].float(),
        "encoder_hidden_states": [d.alone(8, 64)],
        "condition_latents": [d.alone(8, 2, 4, 4)],
        "encoder_hidden_states_image": d.alone(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }


add(
    "WanAnimate2Transformer3DModel",
    {"text_len": 16, "in_dim": 12, "dim": 128, "ffn_dim": 256, "freq_dim": 64, "text_dim": 64, "out_dim": 4}
    | {"num_heads": 4, "num_layers": 2, "use_img_emb": True},
    animate2,
)
