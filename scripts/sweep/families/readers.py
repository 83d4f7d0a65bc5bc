"""Painters whose prompts are read by language models: Qwen-Image, Z-Image, HiDream, Kandinsky 5 and others."""

from __future__ import annotations

import sys

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
    pictures,
    prompted,
    tiny,
    uniform,
    vae,
)

BLOCKS = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
SIZE = {"height": 32, "width": 32}
SHORT = SIZE | {"max_sequence_length": 64}


def given(*names: str, **more: object) -> dict:
    """Conditioning of prompts with pictures and masks under these names."""
    return prompted(**{name: mask() if "mask" in name else uniform(2, 3, 32, 32) for name in names}, **more)


def qwen_tokenizer(length: int = 1024) -> tr.PreTrainedTokenizerFast:
    return standins.tokenizer(length, ends=False)


def qwen_vae():
    """AutoencoderKLQwenImage: 4 times smaller."""
    return tiny(
        d.AutoencoderKLQwenImage,
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


QWEN = BLOCKS | {"patch_size": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 16}
QWEN |= {"axes_dims_rope": (8, 4, 4)}


def small(kind: type) -> type:
    """A pipeline that edits pictures as if they had a million pixels, from now on with 32 x 32."""
    module = sys.modules[kind.__module__]
    sizes = module.calculate_dimensions
    module.calculate_dimensions = lambda area, ratio: (32, 32, *sizes(area, ratio)[2:])
    return kind


def qwen(kind, *names, control=None, reads=False, conditioning=None, alone=False, **kwargs) -> Case:
    pipe = make(
        kind,
        scheduler=EULER(),
        vae=qwen_vae(),
        transformer=tiny(d.QwenImageTransformer2DModel, **QWEN),
        text_encoder=standins.qwen_vl("2.5"),
        tokenizer=qwen_tokenizer(),
        **({} if control is None else {"controlnet": tiny(d.QwenImageControlNetModel, **QWEN | control)}),
        **({"processor": standins.PictureReader()} if reads else {}),
    )
    return Case(pipe, conditioning or given(*names), SHORT | kwargs, alone)


ZIMAGE = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "rope_theta": 256.0,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
}


def qwen3(kind: type = tr.Qwen3Model, **more: object) -> dict:
    """Qwen 3 and its tokenizer."""
    encoder = standins.decoder(kind, tr.Qwen3Config, **more)
    return {"text_encoder": encoder, "tokenizer": qwen_tokenizer()}


def z_image(kind, *names, control=None, **kwargs) -> Case:
    pipe = make(
        kind,
        scheduler=EULER(),
        vae=vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        transformer=tiny(d.ZImageTransformer2DModel, **ZIMAGE),
        **qwen3(),
        **({} if control is None else {"controlnet": control()}),
    )
    fixed = {"guidance_scale": 3.0, "cfg_normalization": False, "cfg_truncation": 1.0}
    return Case(pipe, given(*names), SHORT | fixed | kwargs)


def hidream() -> Case:
    config = {"num_single_layers": 1, "patch_size": 2, "in_channels": 4, "out_channels": 4, "text_emb_dim": 64}
    config |= {"caption_channels": [32, 16], "axes_dims_rope": (8, 4, 4), "max_resolution": (32, 32)}
    config |= {"llama_layers": (0, 1), "num_routed_experts": 4, "num_activated_experts": 2}
    pipe = make(
        d.HiDreamImagePipeline,
        scheduler=EULER(),
        vae=vae(shift_factor=0.1159),
        transformer=tiny(d.HiDreamImageTransformer2DModel, **BLOCKS | config),
        text_encoder=standins.clip(projected=True),
        tokenizer=standins.clip_tokenizer(),
        text_encoder_2=standins.clip(projected=True),
        tokenizer_2=standins.clip_tokenizer(),
        text_encoder_3=standins.t5(),
        tokenizer_3=standins.tokenizer(128),
        text_encoder_4=standins.decoder(tr.LlamaForCausalLM, tr.LlamaConfig),
        tokenizer_4=standins.tokenizer(128),
    )
    return Case(pipe, prompted(), SHORT)


KANDINSKY = {
    "in_visual_dim": 16,
    "in_text_dim": 16,
    "in_text_dim2": 16,
    "time_dim": 16,
    "out_visual_dim": 16,
    "patch_size": (1, 2, 2),
    "model_dim": 16,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 2, 2),
}


def kandinsky5_readers() -> dict:
    return {
        "text_encoder": standins.qwen_vl("2.5"),
        "tokenizer": standins.PictureReader(),
        "text_encoder_2": standins.clip(16),
        "tokenizer_2": standins.clip_tokenizer(),
    }


def kandinsky5(kind, *names, sees=False, blocks=2, alone=False, **kwargs) -> Case:
    pipe = make(
        kind,
        scheduler=EULER(shift=7.0),
        vae=vae(blocks, 16, use_quant_conv=False, use_post_quant_conv=False),
        transformer=tiny(d.Kandinsky5Transformer3DModel, visual_cond=sees, **KANDINSKY),
        **kandinsky5_readers(),
    )
    pipe.resolutions = [(64, 64)]
    return Case(pipe, given(*names), {"height": 64, "width": 64, "max_sequence_length": 16} | kwargs, alone)


OVIS = BLOCKS | {"patch_size": 1, "in_channels": 4, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}


def ovis() -> Case:
    transformer = tiny(d.OvisImageTransformer2DModel, out_channels=4, joint_attention_dim=16, **OVIS)
    pipe = make(d.OvisImagePipeline, scheduler=EULER(), vae=flux_vae(), transformer=transformer, **qwen3())
    return Case(pipe, prompted(negative_prompt=["bad", "ugly"]), SHORT)


def longcat(kind, alone=False, **kwargs) -> Case:
    config = OVIS | {"in_channels": 64, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    pipe = make(
        kind,
        scheduler=EULER(),
        vae=flux_vae(16),
        transformer=tiny(d.LongCatImageTransformer2DModel, **config),
        text_encoder=standins.qwen_vl("2.5"),
        tokenizer=qwen_tokenizer(),
        text_processor=standins.PictureReader(),
    )
    return Case(pipe, prompted(), kwargs, alone)


def prx(kind, pixels=False) -> Case:
    config = {"patch_size": 1, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "axes_dim": [4, 4]}
    config |= {"in_channels": 3 if pixels else 4, "context_in_dim": 16}
    config |= {"bottleneck_size": 8, "resolution_embeds": True} if pixels else {}
    parts = {"prompt_max_tokens": 16} if pixels else {"vae": flux_vae(4)}
    transformer = tiny(d.PRXTransformer2DModel, **config)
    pipe = make(kind, scheduler=EULER(), transformer=transformer, **qwen3(), **parts)
    return Case(pipe, prompted(), SIZE | {"use_resolution_binning": False}, alone=True)  # guidance fails for two


PIPELINES: Builders = {
    "QwenImagePipeline": lambda: qwen(d.QwenImagePipeline, true_cfg_scale=1.0),
    "QwenImagePipeline, guided": lambda: qwen(
        d.QwenImagePipeline, conditioning=prompted(negative_prompt=["bad", "very ugly"]), true_cfg_scale=3.0
    ),
    "QwenImageImg2ImgPipeline": lambda: qwen(d.QwenImageImg2ImgPipeline, "image", strength=0.8),
    "QwenImageInpaintPipeline": lambda: qwen(d.QwenImageInpaintPipeline, "image", "mask_image", strength=0.8),
    "QwenImageControlNetPipeline": lambda: qwen(d.QwenImageControlNetPipeline, "control_image", control={}),
    "QwenImageControlNetInpaintPipeline": lambda: qwen(
        d.QwenImageControlNetInpaintPipeline, "control_image", "control_mask", control={"extra_condition_channels": 4}
    ),
    "QwenImageEditPipeline": lambda: qwen(small(d.QwenImageEditPipeline), reads=True, alone=True, image=picture()),
    "QwenImageEditInpaintPipeline": lambda: qwen(
        small(d.QwenImageEditInpaintPipeline),
        reads=True,
        alone=True,
        image=picture(),
        mask_image=mask(32, 1),
        strength=0.8,
    ),
    "QwenImageEditPlusPipeline": lambda: qwen(
        small(d.QwenImageEditPlusPipeline), reads=True, alone=True, image=pictures()
    ),
    "ZImagePipeline": lambda: z_image(d.ZImagePipeline),
    "ZImageImg2ImgPipeline": lambda: z_image(d.ZImageImg2ImgPipeline, "image", strength=0.8),
    "ZImageInpaintPipeline": lambda: z_image(d.ZImageInpaintPipeline, "image", "mask_image", strength=0.8),
    "HiDreamImagePipeline": hidream,
    "Kandinsky5T2IPipeline": lambda: kandinsky5(d.Kandinsky5T2IPipeline),
    "Kandinsky5I2IPipeline": lambda: kandinsky5(
        d.Kandinsky5I2IPipeline, sees=True, blocks=4, alone=True, image=picture(64), max_sequence_length=768
    ),
    "OvisImagePipeline": ovis,
    "LongCatImagePipeline": lambda: longcat(d.LongCatImagePipeline, **SIZE, enable_prompt_rewrite=False),
    "LongCatImageEditPipeline": lambda: longcat(small(d.LongCatImageEditPipeline), alone=True, image=picture(32)),
    "PRXPipeline": lambda: prx(d.PRXPipeline),
    "PRXPixelPipeline": lambda: prx(d.PRXPixelPipeline, pixels=True),
}
