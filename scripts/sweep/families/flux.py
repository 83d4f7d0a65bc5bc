"""FLUX, FLUX.2 and what is built like them: Chroma, Bria, OvisImage, VisualCloze."""

from __future__ import annotations

import diffusers as d
import transformers as tr
from families import standins
from families.base import (
    EULER,
    Builders,
    Case,
    flux_vae,
    make,
    mask,
    picture,
    prompted,
    text,
    tiny,
    uniform,
    vae,
    wan_vae,
)

BLOCKS = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
FLUX = BLOCKS | {
    "patch_size": 1,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
SIZE = {"height": 16, "width": 16, "max_sequence_length": 48}
IMAGE = {"height": 32, "width": 32, "max_sequence_length": 48}


def readers() -> dict:
    return {
        "text_encoder": standins.clip(),
        "text_encoder_2": standins.t5(),
        "tokenizer": standins.clip_tokenizer(),
        "tokenizer_2": standins.tokenizer(),
    }


def flux(kind, conditioning=None, latent=1, channels=None, more=None, size=SIZE, out=None, **kwargs) -> Case:
    channels = channels or 4 * latent
    transformer = tiny(d.FluxTransformer2DModel, in_channels=channels, out_channels=out, **FLUX)
    pipe = make(kind, scheduler=EULER(), transformer=transformer, vae=flux_vae(latent), **readers() | (more or {}))
    return Case(pipe, conditioning or prompted(), size | kwargs)


def control_net(channels: int) -> dict:
    config = {k: v for k, v in FLUX.items() if k != "guidance_embeds"}
    return {"controlnet": tiny(d.FluxControlNetModel, in_channels=channels, guidance_embeds=True, **config)}


def image_and(*names: str, size: int = 32) -> dict:
    """Conditioning with pictures and masks under these names."""
    return prompted(**{name: mask(size) if "mask" in name else uniform(2, 3, size, size) for name in names})


def visual_cloze(kind, **kwargs) -> Case:
    config = FLUX | {"attention_head_dim": 6, "axes_dims_rope": (2, 2, 2)}
    transformer = tiny(d.FluxTransformer2DModel, in_channels=12, out_channels=4, **config)
    pipe = make(kind, scheduler=EULER(), transformer=transformer, vae=flux_vae(), resolution=32, **readers())
    shown = [[picture(32, 0), picture(32, 1)], [picture(32, 2), None]]
    kwargs = {
        "image": shown,
        "max_sequence_length": 77,
        "content_prompt": "a lake",
        "task_prompt": "[IMAGE1] becomes [IMAGE2]",
    } | kwargs
    return Case(pipe, {}, kwargs, alone=True)


FLUX2 = BLOCKS | {"in_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}


def flux2_vae():
    return tiny(
        d.AutoencoderKLFlux2,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2(kind, guidance=True, conditioning=None, size=SIZE, **kwargs) -> Case:
    if guidance:
        encoder = standins.random(
            tr.Mistral3ForConditionalGeneration,
            tr.Mistral3Config(
                text_config={"model_type": "mistral", "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
                | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, **standins.TOKENS},
                vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32}
                | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
                image_token_index=standins.IDS["[IMG]"],
            ),
        )
    else:
        encoder = standins.decoder(tr.Qwen3ForCausalLM, tr.Qwen3Config)
    pipe = make(
        kind,
        scheduler=EULER(),
        vae=flux2_vae(),
        text_encoder=encoder,
        tokenizer=standins.tokenizer(512, ends=False),
        transformer=tiny(d.Flux2Transformer2DModel, guidance_embeds=guidance, **FLUX2),
    )
    kwargs = size | {"text_encoder_out_layers": (1,), "max_sequence_length": 64} | kwargs
    return Case(pipe, conditioning or prompted(), kwargs)


CHROMA = BLOCKS | {
    "patch_size": 1,
    "in_channels": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}


def chroma(kind, conditioning=None, size=SIZE, **kwargs) -> Case:
    transformer = tiny(d.ChromaTransformer2DModel, **CHROMA)
    pipe = make(kind, scheduler=EULER(), transformer=transformer, vae=flux_vae(), **text())
    return Case(pipe, conditioning or prompted(negative_prompt=["bad", "ugly"]), size | kwargs)


BRIA = BLOCKS | {"patch_size": 1, "in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8]}


def bria() -> Case:
    transformer = tiny(d.BriaTransformer2DModel, **BRIA)
    pipe = make(d.BriaPipeline, scheduler=EULER(), transformer=transformer, vae=vae(1, shift_factor=0.0), **text())
    return Case(pipe, prompted(), SIZE)


def fibo(kind, **kwargs) -> Case:
    config = BRIA | {"joint_attention_dim": 32, "text_encoder_dim": 16, "in_channels": 16}
    # The pipeline reads an empty prompt as token 128000.
    encoder = standins.decoder(tr.SmolLM3ForCausalLM, tr.SmolLM3Config, layers=2, vocab_size=128256)
    coder = wan_vae(in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)
    pipe = make(
        kind,
        scheduler=EULER(),
        transformer=tiny(d.BriaFiboTransformer2DModel, **config),
        vae=coder,
        text_encoder=encoder,
        tokenizer=standins.tokenizer(512, ends=False),
    )
    return Case(pipe, prompted(), {"height": 32, "width": 32, "max_sequence_length": 64} | kwargs)


PIPELINES: Builders = {
    "FluxPipeline": lambda: flux(d.FluxPipeline),
    "FluxImg2ImgPipeline": lambda: flux(d.FluxImg2ImgPipeline, image_and("image"), size=IMAGE, strength=0.8),
    "FluxInpaintPipeline": lambda: flux(
        d.FluxInpaintPipeline, image_and("image", "mask_image"), latent=2, size=IMAGE, strength=0.8
    ),
    "FluxFillPipeline": lambda: flux(
        d.FluxFillPipeline, image_and("image", "mask_image"), latent=2, channels=20, out=8, size=IMAGE
    ),
    "FluxControlPipeline": lambda: flux(
        d.FluxControlPipeline, image_and("control_image"), channels=8, out=4, size=IMAGE
    ),
    "FluxControlImg2ImgPipeline": lambda: flux(
        d.FluxControlImg2ImgPipeline, image_and("image", "control_image"), channels=8, out=4, size=IMAGE, strength=0.8
    ),
    "FluxControlInpaintPipeline": lambda: flux(
        d.FluxControlInpaintPipeline,
        image_and("image", "control_image", "mask_image"),
        channels=8,
        out=4,
        size=IMAGE,
        strength=0.8,
    ),
    "FluxControlNetPipeline": lambda: flux(
        d.FluxControlNetPipeline, image_and("control_image"), latent=1, size=IMAGE, more=control_net(4)
    ),
    "FluxControlNetImg2ImgPipeline": lambda: flux(
        d.FluxControlNetImg2ImgPipeline,
        image_and("image", "control_image"),
        size=IMAGE,
        more=control_net(4),
        strength=0.8,
    ),
    "FluxControlNetInpaintPipeline": lambda: flux(
        d.FluxControlNetInpaintPipeline,
        image_and("image", "control_image", "mask_image"),
        latent=2,
        size=IMAGE,
        more=control_net(8),
        strength=0.8,
    ),
    "FluxKontextPipeline": lambda: flux(
        d.FluxKontextPipeline, image_and("image"), size=IMAGE, max_area=32 * 32, _auto_resize=False
    ),
    "FluxKontextInpaintPipeline": lambda: flux(
        d.FluxKontextInpaintPipeline,
        image_and("image", "mask_image"),
        size=IMAGE,
        max_area=32 * 32,
        _auto_resize=False,
    ),
    "VisualClozeGenerationPipeline": lambda: visual_cloze(d.VisualClozeGenerationPipeline),
    "VisualClozePipeline": lambda: visual_cloze(
        d.VisualClozePipeline, upsampling_height=32, upsampling_width=32, upsampling_strength=0.4
    ),
    "Flux2Pipeline": lambda: flux2(d.Flux2Pipeline),
    "Flux2KleinPipeline": lambda: flux2(d.Flux2KleinPipeline, guidance=False),
    "Flux2KleinKVPipeline": lambda: flux2(d.Flux2KleinKVPipeline, guidance=False, image=picture(64)),
    "Flux2KleinInpaintPipeline": lambda: flux2(
        d.Flux2KleinInpaintPipeline, False, image_and("image", "mask_image"), size=IMAGE, strength=0.8
    ),
    "ChromaPipeline": lambda: chroma(d.ChromaPipeline),
    "ChromaImg2ImgPipeline": lambda: chroma(d.ChromaImg2ImgPipeline, image_and("image"), IMAGE, strength=0.8),
    "ChromaInpaintPipeline": lambda: chroma(
        d.ChromaInpaintPipeline, image_and("image", "mask_image"), IMAGE, strength=0.8
    ),
    "BriaPipeline": bria,
    "BriaFiboPipeline": lambda: fibo(d.BriaFiboPipeline),
}
