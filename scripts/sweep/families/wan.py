"""Video by Wan and what is built like it: SkyReels, ChronoEdit, AnyFlow, Helios, Lucy."""

from __future__ import annotations

import diffusers as d
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
    wan_vae,
)

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


CLIP_SEEN = {"image_dim": 16}


SIZE = {"height": 16, "width": 16, "max_sequence_length": 16}


NINE = SIZE | {"num_frames": 9}


def clip_seen() -> dict:
    """CLIP's image encoder and what prepares its pictures."""
    return {"image_encoder": standins.clip_vision(16, projected=True), "image_processor": standins.clip_pictures()}


def shifted(**more: object) -> d.UniPCMultistepScheduler:
    """UniPC as Wan 2.2 and SkyReels take it: on flows."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return d.UniPCMultistepScheduler(**flow | more)


def wan(
    kind,
    more=None,
    twice=False,
    parts=None,
    scheduler=None,
    network=None,
    alone=False,
    size=NINE,
    conditioning=None,
    **kwargs,
) -> Case:
    config = WAN | (more or {})
    network = network or d.WanTransformer3DModel
    pipe = make(
        kind,
        scheduler=scheduler or EULER(shift=7.0),
        vae=wan_vae(),
        transformer=tiny(network, **config),
        **text(),
        **({"transformer_2": tiny(network, **config), "boundary_ratio": 0.875} if twice else {}),
        **(parts or {}),
    )
    return Case(pipe, conditioning or prompted(), size | kwargs, alone)


def plain(*args: object, **kwargs: object) -> Case:
    """A case of `wan` that takes one prompt and one generator, no lists of one."""
    case = wan(*args, alone=True, **kwargs)
    case.plain = True
    return case


def skyreels(kind, more=None, parts=None, size=NINE, **kwargs) -> Case:
    network = d.SkyReelsV2Transformer3DModel
    return wan(kind, more, parts=parts, scheduler=shifted(flow_shift=8.0), network=network, size=size, **kwargs)


def animated() -> dict:
    return CLIP_SEEN | {
        "in_channels": 36,
        "latent_channels": 16,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }


FRAMES = pictures(16, 9)


PIPELINES: Builders = {
    "WanPipeline": lambda: wan(d.WanPipeline),
    "WanPipeline, two transformers": lambda: wan(d.WanPipeline, twice=True, scheduler=shifted()),
    "WanPipeline, a time a token": lambda: wan(d.WanPipeline, parts={"expand_timesteps": True}, scheduler=shifted()),
    "WanImageToVideoPipeline": lambda: wan(
        d.WanImageToVideoPipeline, CLIP_SEEN | {"in_channels": 36}, parts=clip_seen(), alone=True, image=picture(16)
    ),
    "WanImageToVideoPipeline, two transformers": lambda: wan(
        d.WanImageToVideoPipeline, {"in_channels": 36}, twice=True, scheduler=shifted(), alone=True, image=picture(16)
    ),
    "WanVideoToVideoPipeline": lambda: wan(
        d.WanVideoToVideoPipeline, scheduler=shifted(), size=SIZE, video=FRAMES, alone=True, strength=0.8
    ),
    "WanVACEPipeline": lambda: plain(
        d.WanVACEPipeline,
        {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 96},
        network=d.WanVACETransformer3DModel,
        video=FRAMES,
        mask=[picture(16, 5, "L")] * 9,
    ),
    "WanAnimatePipeline": lambda: wan(
        d.WanAnimatePipeline,
        animated(),
        network=d.WanAnimateTransformer3DModel,
        parts=clip_seen(),
        size=SIZE,
        alone=True,
        image=picture(16),
        pose_video=pictures(16, 17),
        face_video=pictures(16, 17),
        mode="animate",
        prev_segment_conditioning_frames=1,
        guidance_scale=1.0,
    ),
    "SkyReelsV2Pipeline": lambda: skyreels(d.SkyReelsV2Pipeline),
    "SkyReelsV2DiffusionForcingPipeline": lambda: skyreels(d.SkyReelsV2DiffusionForcingPipeline),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": lambda: skyreels(
        d.SkyReelsV2DiffusionForcingImageToVideoPipeline, alone=True, image=picture(16)
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": lambda: skyreels(
        d.SkyReelsV2DiffusionForcingVideoToVideoPipeline,
        alone=True,
        video=pictures(16, 7),
        num_frames=17,
        overlap_history=3,
        base_num_frames=5,
    ),
    "SkyReelsV2ImageToVideoPipeline": lambda: skyreels(
        d.SkyReelsV2ImageToVideoPipeline,
        CLIP_SEEN | {"in_channels": 36},
        parts=clip_seen(),
        alone=True,
        image=picture(16),
    ),
    "ChronoEditPipeline": lambda: wan(
        d.ChronoEditPipeline,
        CLIP_SEEN | {"in_channels": 36},
        network=d.ChronoEditTransformer3DModel,
        parts=clip_seen(),
        alone=True,
        image=picture(16),
        size=SIZE | {"num_frames": 5},
    ),
    "AnyFlowPipeline": lambda: wan(
        d.AnyFlowPipeline,
        network=d.AnyFlowTransformer3DModel,
        scheduler=d.FlowMapEulerDiscreteScheduler(shift=5.0),
    ),
    "AnyFlowFARPipeline": lambda: wan(
        d.AnyFlowFARPipeline,
        {"chunk_partition": (1, 1, 1)},
        network=d.AnyFlowFARTransformer3DModel,
        scheduler=d.FlowMapEulerDiscreteScheduler(shift=5.0),
    ),
    "LucyEditPipeline": lambda: wan(
        d.LucyEditPipeline, {"in_channels": 32}, alone=True, size=NINE, video=pictures(16, 9)
    ),
}
