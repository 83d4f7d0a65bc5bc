"""Stable Diffusion 1, 2 and XL: text, pictures, masks, ControlNets, T2I adapters, perturbed attention, LCM."""

from __future__ import annotations

from collections.abc import Callable

import diffusers as d
import torch
from families import standins
from families.base import Builders, Case, make, mask, picture, prompted, tiny, uniform, vae

UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
}
XL = UNET | {
    "cross_attention_dim": 64,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
CONTROL = {"conditioning_embedding_out_channels": (8, 16)}
NET_ONLY = ("sample_size", "up_block_types", "out_channels", "in_channels", "time_cond_proj_dim")
STAGE = {"safety_checker": None, "feature_extractor": None}


def scheduler() -> d.DDIMScheduler:
    return d.DDIMScheduler(**DDIM, set_alpha_to_one=False, steps_offset=1)


def control_net(unet: dict, kind: type = d.ControlNetModel, **more: object) -> dict:
    """A ControlNet for a U-Net of this configuration, as a part of a pipeline."""
    config = {name: value for name, value in unet.items() if name not in NET_ONLY}
    return {"controlnet": tiny(kind, **config, **CONTROL, **more)}


def given(*names: str, size: int = 16) -> dict:
    """Conditioning of prompts with pictures and masks under these names."""
    return prompted(**{name: mask(size) if "mask" in name else uniform(2, 3, size, size) for name in names})


def sd(kind, *names, channels=4, parts=STAGE, unet=None, conditioning=None, alone=False, **kwargs) -> Case:
    """Stable Diffusion 1 or 2; `names` are pictures that it is given."""
    pipe = make(
        kind,
        unet=tiny(d.UNet2DConditionModel, **UNET | {"in_channels": channels} | (unet or {})),
        vae=vae(),
        text_encoder=standins.clip(),
        tokenizer=standins.clip_tokenizer(),
        **{"scheduler": scheduler()} | parts,
    )
    return Case(pipe, given(*names) if conditioning is None else conditioning, kwargs, alone)


def xl(kind, *names, channels=4, parts=None, embedded=80, conditioning=None, alone=False, **kwargs) -> Case:
    """Stable Diffusion XL; `embedded` is the width of its size embeddings, 72 with aesthetic scores."""
    config = XL | {"in_channels": channels, "projection_class_embeddings_input_dim": embedded}
    pipe = make(
        kind,
        unet=tiny(d.UNet2DConditionModel, **config),
        vae=vae(),
        text_encoder=standins.clip(),
        tokenizer=standins.clip_tokenizer(),
        text_encoder_2=standins.clip(projected=True),
        tokenizer_2=standins.clip_tokenizer(),
        **{"scheduler": scheduler()} | (parts or {}),
    )
    return Case(pipe, given(*names) if conditioning is None else conditioning, kwargs, alone)


def adapter(kind: str, factor: int) -> dict:
    """A T2I adapter that makes pictures `factor` times smaller."""
    config = {"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": factor}
    return {"adapter": tiny(d.T2IAdapter, adapter_type=kind, **config)}


def controlled() -> dict:
    return STAGE | control_net(UNET)


def controlled_xl() -> dict:
    return control_net(XL)


def union_xl() -> dict:
    trained = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return control_net(XL, d.ControlNetUnionModel, num_control_type=6, **trained)


def consistent() -> dict:
    return {"scheduler": d.LCMScheduler(set_alpha_to_one=False), "requires_safety_checker": False} | STAGE


def edit(build: Callable[..., Case], kind: type, parts: dict) -> Case:
    """LEDITS++ on a picture that was inverted beforehand; it edits this one picture."""
    sampler = d.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)
    kwargs = {"editing_prompt": ["glasses", "sunshine"], "edit_guidance_scale": [10.0, 5.0]}
    case = build(kind, parts=parts | {"scheduler": sampler}, conditioning={}, alone=True, **kwargs)
    generator = torch.Generator().manual_seed(0)
    case.pipe.invert(image=picture(32), num_inversion_steps=4, skip=0.2, generator=generator)
    return case


ONE_HINT = {"control_image": [picture(16)], "control_mode": [1]}
LCM_UNET = {"time_cond_proj_dim": 32}
PAG = {"pag_scale": 3.0}
ADAPTED = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

PIPELINES: Builders = {
    "StableDiffusionPipeline": lambda: sd(d.StableDiffusionPipeline),
    "StableDiffusionImg2ImgPipeline": lambda: sd(d.StableDiffusionImg2ImgPipeline, "image"),
    "StableDiffusionInpaintPipeline": lambda: sd(d.StableDiffusionInpaintPipeline, "image", "mask_image", channels=9),
    "StableDiffusionInpaintPipeline, U-Net of 4 channels": lambda: sd(
        d.StableDiffusionInpaintPipeline, "image", "mask_image"
    ),
    "StableDiffusionInstructPix2PixPipeline": lambda: sd(
        d.StableDiffusionInstructPix2PixPipeline, "image", channels=8, image_guidance_scale=1.0
    ),
    "StableDiffusionControlNetPipeline": lambda: sd(d.StableDiffusionControlNetPipeline, "image", parts=controlled()),
    "StableDiffusionControlNetImg2ImgPipeline": lambda: sd(
        d.StableDiffusionControlNetImg2ImgPipeline, "image", "control_image", parts=controlled()
    ),
    "StableDiffusionControlNetInpaintPipeline": lambda: sd(
        d.StableDiffusionControlNetInpaintPipeline,
        "image",
        "mask_image",
        "control_image",
        channels=9,
        parts=controlled(),
    ),
    "StableDiffusionAdapterPipeline": lambda: sd(
        d.StableDiffusionAdapterPipeline, "image", parts=STAGE | adapter("full_adapter", 2), unet=ADAPTED
    ),
    "StableDiffusionXLAdapterPipeline": lambda: xl(
        d.StableDiffusionXLAdapterPipeline, "image", parts=adapter("full_adapter_xl", 4)
    ),
    "LatentConsistencyModelPipeline": lambda: sd(d.LatentConsistencyModelPipeline, parts=consistent(), unet=LCM_UNET),
    "LatentConsistencyModelImg2ImgPipeline": lambda: sd(
        d.LatentConsistencyModelImg2ImgPipeline, "image", parts=consistent(), unet=LCM_UNET
    ),
    "StableDiffusionPAGPipeline": lambda: sd(d.StableDiffusionPAGPipeline, **PAG),
    "StableDiffusionPAGImg2ImgPipeline": lambda: sd(d.StableDiffusionPAGImg2ImgPipeline, "image", **PAG),
    "StableDiffusionPAGInpaintPipeline": lambda: sd(
        d.StableDiffusionPAGInpaintPipeline, "image", "mask_image", **PAG
    ),
    "StableDiffusionControlNetPAGPipeline": lambda: sd(
        d.StableDiffusionControlNetPAGPipeline, "image", parts=controlled(), **PAG
    ),
    "StableDiffusionControlNetPAGInpaintPipeline": lambda: sd(
        d.StableDiffusionControlNetPAGInpaintPipeline,
        "image",
        "mask_image",
        "control_image",
        channels=9,
        parts=controlled(),
        **PAG,
    ),
    "StableDiffusionXLPipeline": lambda: xl(d.StableDiffusionXLPipeline),
    "StableDiffusionXLImg2ImgPipeline": lambda: xl(
        d.StableDiffusionXLImg2ImgPipeline,
        "image",
        strength=0.8,
        embedded=72,
        parts={"requires_aesthetics_score": True},
    ),
    "StableDiffusionXLInpaintPipeline": lambda: xl(
        d.StableDiffusionXLInpaintPipeline, "image", "mask_image", strength=0.8
    ),
    "StableDiffusionXLInstructPix2PixPipeline": lambda: xl(
        d.StableDiffusionXLInstructPix2PixPipeline, "image", channels=8, image_guidance_scale=1.0, height=16, width=16
    ),
    "StableDiffusionXLControlNetPipeline": lambda: xl(
        d.StableDiffusionXLControlNetPipeline, "image", parts=controlled_xl()
    ),
    "StableDiffusionXLControlNetImg2ImgPipeline": lambda: xl(
        d.StableDiffusionXLControlNetImg2ImgPipeline, "image", "control_image", parts=controlled_xl()
    ),
    "StableDiffusionXLControlNetInpaintPipeline": lambda: xl(
        d.StableDiffusionXLControlNetInpaintPipeline, "image", "mask_image", "control_image", parts=controlled_xl()
    ),
    "StableDiffusionXLControlNetUnionPipeline": lambda: xl(
        d.StableDiffusionXLControlNetUnionPipeline, parts=union_xl(), **ONE_HINT
    ),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": lambda: xl(
        d.StableDiffusionXLControlNetUnionImg2ImgPipeline, "image", parts=union_xl(), **ONE_HINT
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": lambda: xl(
        d.StableDiffusionXLControlNetUnionInpaintPipeline, "image", "mask_image", parts=union_xl(), **ONE_HINT
    ),
    "StableDiffusionXLPAGPipeline": lambda: xl(d.StableDiffusionXLPAGPipeline, **PAG),
    "StableDiffusionXLPAGImg2ImgPipeline": lambda: xl(
        d.StableDiffusionXLPAGImg2ImgPipeline, "image", strength=0.8, **PAG
    ),
    "StableDiffusionXLPAGInpaintPipeline": lambda: xl(
        d.StableDiffusionXLPAGInpaintPipeline, "image", "mask_image", **PAG
    ),
    "StableDiffusionXLControlNetPAGPipeline": lambda: xl(
        d.StableDiffusionXLControlNetPAGPipeline, "image", parts=controlled_xl(), **PAG
    ),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": lambda: xl(
        d.StableDiffusionXLControlNetPAGImg2ImgPipeline, "image", "control_image", parts=controlled_xl(), **PAG
    ),
    "StableDiffusionUpscalePipeline": lambda: sd(
        d.StableDiffusionUpscalePipeline,
        "image",
        channels=7,
        parts=STAGE | {"watermarker": None, "low_res_scheduler": d.DDPMScheduler()},
        unet={"num_class_embeds": 1000, "attention_head_dim": 8, "use_linear_projection": True},
    ),
    "LEditsPPPipelineStableDiffusionXL": lambda: edit(xl, d.LEditsPPPipelineStableDiffusionXL, {}),
}
