"""Transformers that paint from text: Stable Diffusion 3, PixArt, AuraFlow, Lumina, CogView, DiT."""

from __future__ import annotations

import diffusers as d
import transformers as tr
from families import standins
from families.base import (
    EULER,
    Builders,
    Case,
    flux_vae,
    gemma,
    make,
    mask,
    prompted,
    text,
    tiny,
    uniform,
    vae,
)

SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}


SD3 = {
    "sample_size": 16,
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
}


SIZE = {"height": 16, "width": 16}


def given(*names: str, size: int = 16, **more: object) -> dict:
    """Conditioning of prompts with pictures and masks under these names."""
    shown = {name: mask(size) if "mask" in name else uniform(2, 3, size, size) for name in names}
    return prompted(**shown, **more)


def sd3(kind, *names, channels=4, control=None, **kwargs) -> Case:
    config = SD3 | {"in_channels": channels, "out_channels": channels}
    pipe = make(
        kind,
        scheduler=EULER(),
        transformer=tiny(d.SD3Transformer2DModel, **config),
        vae=flux_vae(channels),
        text_encoder=standins.clip(projected=True),
        text_encoder_2=standins.clip(projected=True),
        text_encoder_3=standins.t5(),
        tokenizer=standins.clip_tokenizer(),
        tokenizer_2=standins.clip_tokenizer(),
        tokenizer_3=standins.tokenizer(),
        **({} if control is None else {"controlnet": tiny(d.SD3ControlNetModel, **config | control)}),
    )
    return Case(pipe, given(*names), SIZE | kwargs)


def pixart(kind, **kwargs) -> Case:
    config = SMALL | {
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 32,
        "sample_size": 8,
    }
    transformer = tiny(d.PixArtTransformer2DModel, caption_channels=32, norm_type="ada_norm_single", **config)
    pipe = make(kind, scheduler=d.DDIMScheduler(), transformer=transformer, vae=vae(), **text())
    return Case(pipe, prompted(), {"use_resolution_binning": False} | SIZE | kwargs)


def aura_flow() -> Case:
    transformer = tiny(
        d.AuraFlowTransformer2DModel,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    reader = {"text_encoder": standins.umt5(), "tokenizer": standins.tokenizer()}
    return Case(
        make(d.AuraFlowPipeline, scheduler=EULER(), transformer=transformer, vae=vae(), **reader), prompted(), SIZE
    )


def lumina() -> Case:
    transformer = tiny(
        d.LuminaNextDiT2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=16,
    )
    encoder = standins.decoder(tr.GemmaForCausalLM, tr.GemmaConfig)
    reader = {"text_encoder": encoder, "tokenizer": standins.tokenizer(256, ends=False, bos=True)}
    return Case(
        make(d.LuminaPipeline, scheduler=EULER(), transformer=transformer, vae=vae(), **reader), prompted(), SIZE
    )


def lumina2() -> Case:
    transformer = tiny(
        d.Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 64, 64),
        cap_feat_dim=16,
    )
    pipe = make(d.Lumina2Pipeline, scheduler=EULER(), transformer=transformer, vae=flux_vae(4), **gemma())
    return Case(pipe, prompted(), SIZE | {"max_sequence_length": 32, "system_prompt": "Paint:"})


COGVIEW = SMALL | {"in_channels": 4, "out_channels": 4, "text_embed_dim": 32, "time_embed_dim": 8}


def cogview3() -> Case:
    own = {"condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8}
    transformer = tiny(d.CogView3PlusTransformer2DModel, **COGVIEW | own)
    parts = {"scheduler": d.CogVideoXDDIMScheduler(), "transformer": transformer, "vae": vae()}
    return Case(make(d.CogView3PlusPipeline, **parts, **text()), prompted(), SIZE | {"max_sequence_length": 16})


def cogview4(kind, *names, channels=4, **kwargs) -> Case:
    own = {"condition_dim": 4, "sample_size": 8, "in_channels": channels, "rope_axes_dim": (8, 8)}
    encoder = standins.decoder(tr.GlmForCausalLM, tr.GlmConfig, width=32)
    pipe = make(
        kind,
        scheduler=EULER(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
        transformer=tiny(d.CogView4Transformer2DModel, **COGVIEW | own),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=standins.tokenizer(1024, ends=False, side="left", bos=True),
    )
    return Case(pipe, given(*names), SIZE | {"max_sequence_length": 16} | kwargs)


def dit() -> Case:
    config = SMALL | {"num_layers": 2, "in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2}
    transformer = tiny(d.DiTTransformer2DModel, num_embeds_ada_norm=1000, **config)
    pipe = make(d.DiTPipeline, transformer=transformer, vae=vae(), scheduler=d.DDIMScheduler())
    return Case(pipe, {"class_labels": [1, 7]})


PIPELINES: Builders = {
    "StableDiffusion3Pipeline": lambda: sd3(d.StableDiffusion3Pipeline),
    "StableDiffusion3Img2ImgPipeline": lambda: sd3(d.StableDiffusion3Img2ImgPipeline, "image", strength=0.8),
    "StableDiffusion3InpaintPipeline": lambda: sd3(
        d.StableDiffusion3InpaintPipeline, "image", "mask_image", channels=16, strength=0.8
    ),
    "StableDiffusion3ControlNetPipeline": lambda: sd3(
        d.StableDiffusion3ControlNetPipeline, "control_image", control={"num_layers": 1}
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": lambda: sd3(
        d.StableDiffusion3ControlNetInpaintingPipeline,
        "control_image",
        "control_mask",
        control={"num_layers": 1, "extra_conditioning_channels": 1},
    ),
    "StableDiffusion3PAGPipeline": lambda: sd3(d.StableDiffusion3PAGPipeline, pag_scale=0.7),
    "StableDiffusion3PAGImg2ImgPipeline": lambda: sd3(
        d.StableDiffusion3PAGImg2ImgPipeline, "image", pag_scale=0.7, strength=0.8
    ),
    "PixArtAlphaPipeline": lambda: pixart(d.PixArtAlphaPipeline),
    "PixArtSigmaPipeline": lambda: pixart(d.PixArtSigmaPipeline),
    "PixArtSigmaPAGPipeline": lambda: pixart(d.PixArtSigmaPAGPipeline, pag_scale=3.0),
    "AuraFlowPipeline": aura_flow,
    "LuminaPipeline": lumina,
    "Lumina2Pipeline": lumina2,
    "CogView3PlusPipeline": cogview3,
    "CogView4Pipeline": lambda: cogview4(d.CogView4Pipeline),
    "CogView4ControlPipeline": lambda: cogview4(d.CogView4ControlPipeline, "control_image", channels=8),
    "DiTPipeline": dit,
}
