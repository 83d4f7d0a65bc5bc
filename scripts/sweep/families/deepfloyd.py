"""DeepFloyd IF: three stages in pixels."""

from __future__ import annotations

import diffusers as d
from families.base import Builders, Case, make, mask, prompted, text, tiny, uniform
from families.unets import SIMPLE

IF = SIMPLE | {
    "in_channels": 3,
    "out_channels": 6,
    "act_fn": "gelu",
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "cross_attention_norm": "group_norm",  # of 32 groups
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
}


LEARNED = {"variance_type": "learned_range", "thresholding": True, "dynamic_thresholding_ratio": 0.95}


def deep_floyd(kind, *names, second=False, **kwargs) -> Case:
    own = {"in_channels": 6, "class_embed_type": "timestep"} if second else {}
    pipe = make(
        kind,
        unet=tiny(d.UNet2DConditionModel, **IF | own),
        scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2", **LEARNED),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **text(),
        **({"image_noising_scheduler": d.DDPMScheduler(beta_schedule="squaredcos_cap_v2")} if second else {}),
    )
    large = {"image": 8} if second else {}
    shown = {
        name: mask(16) if "mask" in name else 2 * uniform(2, 3, *[large.get(name, 16)] * 2) - 1 for name in names
    }
    return Case(
        pipe,
        prompted(**shown),
        kwargs | ({"height": 16, "width": 16} if names in ((), ("image",)) and "strength" not in kwargs else {}),
    )


PIPELINES: Builders = {
    "IFPipeline": lambda: deep_floyd(d.IFPipeline),
    "IFImg2ImgPipeline": lambda: deep_floyd(d.IFImg2ImgPipeline, "image", strength=0.8),
    "IFInpaintingPipeline": lambda: deep_floyd(d.IFInpaintingPipeline, "image", "mask_image", strength=0.8),
    "IFSuperResolutionPipeline": lambda: deep_floyd(d.IFSuperResolutionPipeline, "image", second=True),
    "IFImg2ImgSuperResolutionPipeline": lambda: deep_floyd(
        d.IFImg2ImgSuperResolutionPipeline, "image", "original_image", second=True, strength=0.8
    ),
    "IFInpaintingSuperResolutionPipeline": lambda: deep_floyd(
        d.IFInpaintingSuperResolutionPipeline, "image", "original_image", "mask_image", second=True, strength=0.8
    ),
}
