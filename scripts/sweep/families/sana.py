"""SANA and Hunyuan-DiT."""

from __future__ import annotations

import diffusers as d
from families import standins
from families.base import (
    EULER,
    Builders,
    Case,
    gemma,
    make,
    tiny,
    vae,
)
from families.image import SIZE, given

SANA = {
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 8,
}


def sana_vae():
    return tiny(
        d.AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )


def sana(kind, *names, scheduler=None, control=False, sprint=False, **kwargs) -> Case:
    more = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if sprint else {}
    pipe = make(
        kind,
        scheduler=scheduler or EULER(shift=7.0),
        transformer=tiny(d.SanaTransformer2DModel, **SANA | more),
        vae=sana_vae(),
        **gemma(),
        **({"controlnet": tiny(d.SanaControlNetModel, **SANA)} if control else {}),
    )
    fixed = {"height": 32, "width": 32, "max_sequence_length": 16, "complex_human_instruction": None}
    return Case(pipe, given(*names, size=32), fixed | {"use_resolution_binning": False} | kwargs)


HUNYUAN = {
    "sample_size": 8,
    "num_layers": 2,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "in_channels": 4,
    "hidden_size": 32,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 16,
}


def hunyuan_dit(kind, *names, control=False, **kwargs) -> Case:
    own = {"text_len": 77, "text_len_t5": 256}
    net = {name: value for name, value in HUNYUAN.items() if name != "num_layers"}
    pipe = make(
        kind,
        scheduler=d.DDPMScheduler(),
        transformer=tiny(d.HunyuanDiT2DModel, **HUNYUAN | own | ({"num_layers": 4} if control else {})),
        vae=vae(),
        text_encoder=standins.bert(),
        tokenizer=standins.clip_tokenizer(),
        text_encoder_2=standins.t5(),
        tokenizer_2=standins.tokenizer(256),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **(
            {"controlnet": tiny(d.HunyuanDiT2DControlNetModel, transformer_num_layers=4, **net | own)}
            if control
            else {}
        ),
    )
    return Case(pipe, given(*names), {"use_resolution_binning": False} | SIZE | kwargs)


PIPELINES: Builders = {
    "SanaPipeline": lambda: sana(d.SanaPipeline),
    "SanaPAGPipeline": lambda: sana(d.SanaPAGPipeline, pag_scale=3.0),
    "SanaControlNetPipeline": lambda: sana(d.SanaControlNetPipeline, "control_image", control=True),
    "SanaSprintPipeline": lambda: sana(d.SanaSprintPipeline, scheduler=d.SCMScheduler(), sprint=True),
    "SanaSprintImg2ImgPipeline": lambda: sana(
        d.SanaSprintImg2ImgPipeline, "image", scheduler=d.SCMScheduler(), sprint=True, strength=0.8
    ),
    "HunyuanDiTPipeline": lambda: hunyuan_dit(d.HunyuanDiTPipeline),
    "HunyuanDiTPAGPipeline": lambda: hunyuan_dit(d.HunyuanDiTPAGPipeline, pag_scale=3.0),
    "HunyuanDiTControlNetPipeline": lambda: hunyuan_dit(
        d.HunyuanDiTControlNetPipeline, "control_image", control=True
    ),
}
