"""Video, second part: HunyuanVideo 1.5, Mochi, Allegro, Latte, EasyAnimate, SANA-Video, Kandinsky 5, Motif."""

from __future__ import annotations

import diffusers as d
from families import standins
from families.base import (
    EULER,
    Builders,
    Case,
    gemma,
    make,
    picture,
    prompted,
    text,
    tiny,
    vae,
    wan_vae,
)
from families.readers import KANDINSKY, kandinsky5_readers, qwen_tokenizer
from families.wan import NINE, SIZE, WAN

WIDE = {"height": 32, "width": 32}


FEW = WIDE | {"num_frames": 9, "max_sequence_length": 16}


def simple(kind, transformer, vae_, scheduler=None, size=NINE, parts=None, alone=False, **kwargs) -> Case:
    """A pipeline of T5, its tokenizer, a transformer, a VAE and a sampler."""
    scheduler = scheduler or EULER(shift=7.0)
    pipe = make(kind, transformer=transformer, vae=vae_, scheduler=scheduler, **text() | (parts or {}))
    return Case(pipe, prompted(), size | kwargs, alone)


def mochi() -> Case:
    config = {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    config |= {"pooled_projection_dim": 16, "in_channels": 12, "out_channels": None, "qk_norm": "rms_norm"}
    config |= {"text_embed_dim": 32, "time_embed_dim": 4, "activation_fn": "swiglu", "max_sequence_length": 16}
    coder = {"latent_channels": 12, "out_channels": 3, "encoder_block_out_channels": (32,) * 4}
    coder |= {"decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5}
    transformer = tiny(d.MochiTransformer3DModel, **config)
    return simple(d.MochiPipeline, transformer, tiny(d.AutoencoderKLMochi, **coder), EULER(), SIZE, num_frames=7)


def allegro() -> Case:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 24}
    config |= {"in_channels": 4, "out_channels": 4, "sample_width": 8, "sample_height": 8, "sample_frames": 8}
    config |= {"caption_channels": 32}
    coder = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
    coder |= {"down_block_types": ("AllegroDownBlock3D",) * 4, "up_block_types": ("AllegroUpBlock3D",) * 4}
    transformer, coder = tiny(d.AllegroTransformer3DModel, **config), tiny(d.AutoencoderKLAllegro, **coder)
    coder.enable_tiling()
    return simple(d.AllegroPipeline, transformer, coder, d.DDIMScheduler(), SIZE, num_frames=8)


def latte() -> Case:
    config = {"sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 4}
    config |= {"caption_channels": 32, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32}
    config |= {
        "video_length": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
    }
    config |= {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6}
    size = {"height": 16, "width": 16, "video_length": 2}
    return simple(d.LattePipeline, tiny(d.LatteTransformer3DModel, **config), vae(), d.DDIMScheduler(), size)


def easy_animate(kind, channels=4, conditioning=None, alone=False, **kwargs) -> Case:
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": channels, "out_channels": 4}
    config |= {"time_embed_dim": 4, "text_embed_dim": 16, "num_layers": 2, "sample_width": 16, "sample_height": 16}
    coder = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    coder |= {
        "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 2, "SpatialTemporalDownBlock3D"]
    }
    coder |= {"up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3], "spatial_group_norm": False}
    pipe = make(
        kind,
        transformer=tiny(d.EasyAnimateTransformer3DModel, patch_size=2, **config),
        vae=tiny(d.AutoencoderKLMagvit, **coder),
        scheduler=EULER(),
        text_encoder=standins.qwen_vl("2"),
        tokenizer=qwen_tokenizer(),
    )
    read = prompted(negative_prompt=["bad", "ugly"])
    return Case(pipe, conditioning or read, {"height": 16, "width": 16, "num_frames": 5} | kwargs, alone)


def hunyuan15() -> Case:
    config = {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    config |= {"num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16}
    config |= {"text_embed_2_dim": 32, "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16}
    coder = {"latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1}
    coder |= {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2}
    coder |= {"downsample_match_channel": False, "upsample_match_channel": False}
    pipe = make(
        d.HunyuanVideo15Pipeline,
        transformer=tiny(d.HunyuanVideo15Transformer3DModel, task_type="t2v", **config),
        vae=tiny(d.AutoencoderKLHunyuanVideo15, **coder),
        scheduler=EULER(shift=7.0),
        text_encoder=standins.qwen_vl("2.5", part="text"),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=standins.t5(),
        tokenizer_2=standins.tokenizer(256),
        guider=d.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    # Two videos a call fail in the transformer's refiner.
    return Case(pipe, prompted(), {"height": 16, "width": 16, "num_frames": 9}, alone=True)


def sana_video(kind, **kwargs) -> Case:
    config = {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12}
    config |= {"num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12}
    config |= {"cross_attention_dim": 24, "caption_channels": 16, "sample_size": 8, "patch_size": (1, 2, 2)}
    transformer = tiny(d.SanaVideoTransformer3DModel, qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **config)
    fixed = WIDE | {"frames": 9, "max_sequence_length": 16, "complex_human_instruction": []}
    sampler = (
        EULER() if kwargs else d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    )
    size = fixed | {"use_resolution_binning": False}
    return simple(kind, transformer, wan_vae(), sampler, size, gemma(), alone=bool(kwargs), **kwargs)


def kandinsky5(kind, sees=False, **kwargs) -> Case:
    coder = {"latent_channels": 16, "block_out_channels": (32, 64, 64), "layers_per_block": 1}
    coder |= {"down_block_types": ("HunyuanVideoDownBlock3D",) * 3, "up_block_types": ("HunyuanVideoUpBlock3D",) * 3}
    pipe = make(
        kind,
        transformer=tiny(d.Kandinsky5Transformer3DModel, visual_cond=True, **KANDINSKY),
        vae=tiny(d.AutoencoderKLHunyuanVideo, mid_block_add_attention=False, **coder),
        scheduler=EULER(shift=7.0),
        **kandinsky5_readers(),
    )
    return Case(pipe, prompted(), WIDE | {"num_frames": 5, "max_sequence_length": 16} | kwargs, bool(kwargs))


def helios() -> Case:
    config = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)}
    sampler = d.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    transformer = tiny(d.HeliosTransformer3DModel, **config)
    return simple(d.HeliosPipeline, transformer, wan_vae(), sampler, guidance_scale=1.0)


def motif(kind) -> Case:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "num_single_layers": 1}
    config |= {
        "in_channels": 33,
        "out_channels": 16,
        "patch_size": 1,
        "text_embed_dim": 16,
        "rope_axes_dim": (4, 4, 4),
    }
    reader = {
        "text_encoder": t5gemma2(),
        "tokenizer": standins.tokenizer(512),
        "guider": d.AdaptiveProjectedGuidance(),
    }
    size = {"parts": reader, "size": NINE}
    return simple(kind, tiny(d.MotifVideoTransformer3DModel, **config), wan_vae(), **size)


def t5gemma2():
    from transformers.models.t5gemma2 import configuration_t5gemma2 as c
    from transformers.models.t5gemma2 import modeling_t5gemma2 as m

    text_config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "dropout_rate": 0.0}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"}
    config = c.T5Gemma2EncoderConfig(text_config=text_config | standins.TOKENS, vision_config=sight)
    return standins.random(m.T5Gemma2Encoder, config)


PIPELINES: Builders = {
    "MochiPipeline": mochi,
    "AllegroPipeline": allegro,
    "LattePipeline": latte,
    "EasyAnimatePipeline": lambda: easy_animate(d.EasyAnimatePipeline),
    "HunyuanVideo15Pipeline": hunyuan15,
    "SanaVideoPipeline": lambda: sana_video(d.SanaVideoPipeline),
    "SanaImageToVideoPipeline": lambda: sana_video(d.SanaImageToVideoPipeline, image=picture(32)),
    "Kandinsky5T2VPipeline": lambda: kandinsky5(d.Kandinsky5T2VPipeline),
    "HeliosPipeline": helios,
    "MotifVideoPipeline": lambda: motif(d.MotifVideoPipeline),
}
