"""Video by CogVideoX, HunyuanVideo and LTX."""

from __future__ import annotations

import diffusers as d
import transformers as tr
from families import standins
from families.base import (
    EULER,
    Builders,
    Case,
    make,
    picture,
    pictures,
    prompted,
    text,
    tiny,
    uniform,
)
from families.wan import NINE, SIZE

COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 32,
    "num_layers": 1,
    "sample_width": 2,
    "sample_height": 2,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 16,
}


TURNED = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}


def cogvideox(kind, more=None, scheduler=None, alone=False, network=None, size=SIZE, **kwargs) -> Case:
    coder = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    halves = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "temporal_compression_ratio": 4,
    }
    pipe = make(
        kind,
        scheduler=scheduler or d.CogVideoXDDIMScheduler(),
        vae=tiny(d.AutoencoderKLCogVideoX, **coder | halves),
        transformer=tiny(network or d.CogVideoXTransformer3DModel, **COG | (more or {})),
        **text(),
    )
    return Case(pipe, prompted(), size | kwargs, alone)


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (2, 4, 4),
}


PLAIN = {"prompt_template": {"template": "{}", "crop_start": 0}}


def hunyuan_vae():
    return tiny(
        d.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        mid_block_add_attention=True,
    )


def hunyuan_video(kind, more=None, network=None, parts=None, alone=False, **kwargs) -> Case:
    pipe = make(
        kind,
        scheduler=EULER(shift=7.0),
        vae=hunyuan_vae(),
        transformer=tiny(network or d.HunyuanVideoTransformer3DModel, **HUNYUAN | (more or {})),
        text_encoder=standins.decoder(tr.LlamaModel, tr.LlamaConfig, layers=3),
        tokenizer=standins.tokenizer(256, ends=False, bos=True),
        text_encoder_2=standins.clip(16),
        tokenizer_2=standins.clip_tokenizer(),
        **(parts or {}),
    )
    return Case(pipe, prompted(), NINE | PLAIN | {"guidance_scale": 4.5} | kwargs, alone)


LTX = {
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "num_layers": 1,
    "caption_channels": 32,
}


def ltx_vae():
    return tiny(
        d.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


def ltx(kind, conditioning=None, **kwargs) -> Case:
    transformer = tiny(d.LTXVideoTransformer3DModel, **LTX)
    pipe = make(kind, scheduler=EULER(), vae=ltx_vae(), transformer=transformer, **text())
    return Case(pipe, conditioning or prompted(), NINE | {"height": 32, "width": 32} | kwargs)


PIPELINES: Builders = {
    "CogVideoXPipeline": lambda: cogvideox(d.CogVideoXPipeline, num_frames=8),
    "CogVideoXImageToVideoPipeline": lambda: cogvideox(
        d.CogVideoXImageToVideoPipeline, TURNED | {"in_channels": 8}, alone=True, image=picture(16), num_frames=8
    ),
    "CogVideoXVideoToVideoPipeline": lambda: cogvideox(
        d.CogVideoXVideoToVideoPipeline, alone=True, video=pictures(16, 8), strength=0.8
    ),
    "CogVideoXFunControlPipeline": lambda: cogvideox(
        d.CogVideoXFunControlPipeline, {"in_channels": 8}, alone=True, control_video=pictures(16, 8)
    ),
    "HunyuanVideoPipeline": lambda: hunyuan_video(d.HunyuanVideoPipeline),
    "HunyuanSkyreelsImageToVideoPipeline": lambda: hunyuan_video(
        d.HunyuanSkyreelsImageToVideoPipeline, {"in_channels": 8}, alone=True, image=picture(16)
    ),
    "LTXPipeline": lambda: ltx(d.LTXPipeline),
    "LTXImageToVideoPipeline": lambda: ltx(d.LTXImageToVideoPipeline, prompted(image=uniform(2, 3, 32, 32))),
    "LTXConditionPipeline": lambda: ltx(d.LTXConditionPipeline, prompted(image=uniform(2, 3, 32, 32))),
}
