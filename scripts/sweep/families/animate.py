"""Video by U-Nets: AnimateDiff and Stable Video Diffusion."""

from __future__ import annotations

import diffusers as d
from families import standins
from families.base import (
    Builders,
    Case,
    make,
    pictures,
    prompted,
    tiny,
    uniform,
    vae,
)
from families.stable_diffusion import CONTROL, DDIM, UNET, control_net

# The blocks of AnimateDiff's tests: crossing first, so that every block has a motion module.
MOVING = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 16),
}


def animate(kind, conditioning=None, parts=None, alone=False, frames=2, **kwargs) -> Case:
    adapter = {"block_out_channels": (16, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 4}
    pipe = make(
        kind,
        unet=tiny(d.UNet2DConditionModel, **MOVING),
        vae=vae(),
        scheduler=d.DDIMScheduler(**DDIM | {"beta_schedule": "linear"}),
        motion_adapter=tiny(d.MotionAdapter, motion_num_attention_heads=2, **adapter),
        text_encoder=standins.clip(),
        tokenizer=standins.clip_tokenizer(),
        **(parts or {}),
    )
    fixed = {"num_frames": frames} if frames else {}
    return Case(pipe, conditioning or prompted(), fixed | kwargs, alone)


def sparse() -> dict:
    config = {
        k: v
        for k, v in MOVING.items()
        if k in ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    }
    own = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "conditioning_channels": 3}
    own |= {"use_simplified_condition_embedding": False, "num_attention_heads": 2}
    return {"controlnet": tiny(d.SparseControlNetModel, **config | own | CONTROL)}


def stable_video() -> Case:
    config = {"sample_size": 8, "in_channels": 8, "out_channels": 4, "layers_per_block": 1, "num_frames": 2}
    config |= {"block_out_channels": (32, 32), "cross_attention_dim": 32, "num_attention_heads": 2}
    config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24}
    config |= {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    config |= {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
    sampler = {"prediction_type": "v_prediction", "use_karras_sigmas": True, "timestep_type": "continuous"}
    coder = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 1}
    pipe = make(
        d.StableVideoDiffusionPipeline,
        unet=tiny(d.UNetSpatioTemporalConditionModel, **config),
        vae=tiny(d.AutoencoderKLTemporalDecoder, latent_channels=4, **coder),
        scheduler=d.EulerDiscreteScheduler(sigma_min=0.002, sigma_max=700.0, **sampler),
        image_encoder=standins.clip_vision(),
        feature_extractor=standins.clip_pictures(),
    )
    return Case(pipe, {"image": uniform(2, 3, 32, 32)}, {"height": 32, "width": 32} | {"num_frames": 2})


PIPELINES: Builders = {
    "AnimateDiffPipeline": lambda: animate(d.AnimateDiffPipeline),
    "AnimateDiffPAGPipeline": lambda: animate(d.AnimateDiffPAGPipeline, pag_scale=3.0),
    "AnimateDiffControlNetPipeline": lambda: animate(
        d.AnimateDiffControlNetPipeline, parts=control_net(MOVING), alone=True, conditioning_frames=pictures(16)
    ),
    "AnimateDiffSparseControlNetPipeline": lambda: animate(
        d.AnimateDiffSparseControlNetPipeline,
        parts=sparse(),
        alone=True,
        conditioning_frames=pictures(16),
        controlnet_frame_indices=[0, 1],
    ),
    "AnimateDiffVideoToVideoPipeline": lambda: animate(
        d.AnimateDiffVideoToVideoPipeline, frames=None, alone=True, video=pictures(16)
    ),
    "AnimateDiffVideoToVideoControlNetPipeline": lambda: animate(
        d.AnimateDiffVideoToVideoControlNetPipeline,
        parts=control_net(MOVING),
        frames=None,
        alone=True,
        video=pictures(16),
        conditioning_frames=pictures(16),
    ),
    "StableVideoDiffusionPipeline": stable_video,
}
