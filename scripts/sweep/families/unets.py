"""U-Nets and priors around them: Kandinsky, UnCLIP, Marigold, unconditional ones."""

from __future__ import annotations

import diffusers as d
import numpy as np
from families import standins
from families.base import Builders, Case, make, normal, picture, prompted, text, tiny, uniform, vae
from families.stable_diffusion import UNET, scheduler

SIMPLE = {
    "sample_size": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "resnet_time_scale_shift": "scale_shift",
}


MIXED = {"out_channels": 8, "attention_head_dim": 4}


SEEN = MIXED | {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}


READ_AND_SEEN = MIXED | {"encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}


HINTED = SEEN | {"in_channels": 8, "addition_embed_type": "image_hint"}


SIZE = {"height": 32, "width": 32}


def movq(halvings: int = 1):
    """VQModel of Kandinsky: `2 ** halvings` times smaller."""
    down = ["DownEncoderBlock2D"] * halvings + ["AttnDownEncoderBlock2D"]
    return tiny(
        d.VQModel,
        block_out_channels=[32] * len(down),
        down_block_types=down,
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * halvings,
        latent_channels=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        vq_embed_dim=4,
        norm_type="spatial",
    )


def prior() -> dict:
    """The parts of Kandinsky's prior, which dreams up an image embedding."""
    network = tiny(d.PriorTransformer, num_attention_heads=2, attention_head_dim=12, num_layers=1, embedding_dim=32)
    network.clip_std.data.fill_(1.0)
    return {
        "prior": network,
        "image_encoder": standins.clip_vision(),
        "text_encoder": standins.clip(projected=True),
        "tokenizer": standins.clip_tokenizer(),
        "scheduler": d.UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=10.0,
            num_train_timesteps=1000,
        ),
        "image_processor": standins.clip_pictures(),
    }


def decoded(unet: dict, hint: bool = False) -> dict:
    """The parts of Kandinsky's decoder."""
    network = tiny(d.UNet2DConditionModel, **SIMPLE | unet)
    return {"unet": network, "scheduler": scheduler(), "movq": movq(3 if hint else 1)}


def mclip() -> dict:
    """The multilingual CLIP that reads prompts for Kandinsky 2.1."""
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        transformerDimSize=32,
        imageDimSize=32,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        **standins.TOKENS,
    )
    return {"text_encoder": standins.random(MultilingualCLIP, config), "tokenizer": standins.tokenizer()}


EMBEDDED = ("image_embeds", "negative_image_embeds")


def kandinsky(kind, *shown, unet=SEEN, parts=None, hint=False, alone=False, read=False, size=SIZE, **kwargs) -> Case:
    conditioning = {name: normal(2, 32) for name in EMBEDDED} | {
        name: uniform(2, 3, size["height"], size["height"]) for name in shown
    }
    conditioning |= {"prompt": ["a horse", "two cats"]} if read else {}
    pipe = make(kind, **decoded(unet, hint), **(mclip() if read else {}), **(parts or {}))
    return Case(pipe, conditioning, size | kwargs, alone)


def combined(kind, unet=SEEN, read=False, alone=False, **kwargs) -> Case:
    parts = {f"prior_{name}": part for name, part in prior().items()}
    pipe = make(kind, **decoded(unet), **parts, **(mclip() if read else {}))
    for inner in ("prior_pipe", "decoder_pipe"):
        getattr(pipe, inner).set_progress_bar_config(disable=True)
    return Case(pipe, prompted(), SIZE | {"prior_num_inference_steps": 2} | kwargs, alone)


PAINTED = np.pad(np.ones((32, 16), dtype=np.float32), ((0, 0), (0, 16)))


def kandinsky3(kind, *names, **kwargs) -> Case:
    config = {"time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2}
    config |= {"block_out_channels": (16, 32), "cross_attention_dim": 4, "encoder_hid_dim": 32}
    steps = d.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2", steps_offset=1)
    parts = {"unet": tiny(d.Kandinsky3UNet, **config), "scheduler": steps, "movq": movq()}
    conditioning = prompted(**{name: uniform(2, 3, 32, 32) for name in names})
    return Case(make(kind, **text(), **parts), conditioning, kwargs)


def marigold(kind, channels, parts, out=4) -> Case:
    pipe = make(
        kind,
        unet=tiny(d.UNet2DConditionModel, **UNET | {"in_channels": channels, "out_channels": out}),
        vae=vae(),
        scheduler=d.DDIMScheduler(prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1),
        text_encoder=standins.clip(),
        tokenizer=standins.clip_tokenizer(),
        **parts,
    )
    return Case(pipe, {"image": uniform(2, 3, 16, 16)}, {"processing_resolution": 0})


def unet2d(**more):
    config = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    halves = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return tiny(d.UNet2DModel, **config | halves | more)


def consistency() -> Case:
    unet = unet2d(num_class_embeds=10)
    pipe = make(d.ConsistencyModelPipeline, unet=unet, scheduler=d.CMStochasticIterativeScheduler())
    return Case(pipe, {"class_labels": [1, 7]})


def unclip(kind, **more) -> Case:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    own = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64}
    reader = {"prior_text_encoder": standins.clip(projected=True), "prior_tokenizer": standins.clip_tokenizer()}
    dreams = {
        "prior": prior()["prior"],
        "prior_scheduler": d.DDPMScheduler(prediction_type="sample", clip_sample_range=5.0),
    }
    sees = {"feature_extractor": standins.clip_pictures(), "image_encoder": standins.clip_vision()}
    parts = sees if "Img2Img" in kind.__name__ else reader | dreams
    pipe = make(
        kind,
        unet=tiny(d.UNet2DConditionModel, **UNET | own),
        vae=vae(),
        scheduler=scheduler(),
        text_encoder=standins.clip(),
        tokenizer=standins.clip_tokenizer(),
        image_normalizer=tiny(StableUnCLIPImageNormalizer, embedding_dim=32),
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        **parts,
    )
    shown = {"image": uniform(2, 3, 32, 32)} if parts is sees else {}
    return Case(pipe, prompted(**shown), {} if parts is sees else {"prior_num_inference_steps": 2})


PIPELINES: Builders = {
    "DDPMPipeline": lambda: Case(make(d.DDPMPipeline, unet=unet2d(), scheduler=d.DDPMScheduler()), {}),
    "DDIMPipeline": lambda: Case(make(d.DDIMPipeline, unet=unet2d(), scheduler=d.DDIMScheduler()), {}),
    "ConsistencyModelPipeline": consistency,
    "KandinskyPriorPipeline": lambda: Case(make(d.KandinskyPriorPipeline, **prior())),
    "KandinskyPipeline": lambda: kandinsky(d.KandinskyPipeline, unet=READ_AND_SEEN, read=True),
    "KandinskyImg2ImgPipeline": lambda: kandinsky(
        d.KandinskyImg2ImgPipeline, unet=READ_AND_SEEN, read=True, alone=True, image=picture(), strength=0.8
    ),
    "KandinskyInpaintPipeline": lambda: kandinsky(
        d.KandinskyInpaintPipeline,
        unet=READ_AND_SEEN | {"in_channels": 9},
        read=True,
        image=picture(),
        mask_image=PAINTED,
        alone=True,
    ),
    "KandinskyCombinedPipeline": lambda: combined(d.KandinskyCombinedPipeline, READ_AND_SEEN, read=True),
    "KandinskyV22PriorPipeline": lambda: Case(make(d.KandinskyV22PriorPipeline, **prior())),
    "KandinskyV22PriorEmb2EmbPipeline": lambda: Case(
        make(d.KandinskyV22PriorEmb2EmbPipeline, **prior()), prompted(image=normal(2, 32)), {"strength": 0.8}
    ),
    "KandinskyV22Pipeline": lambda: kandinsky(d.KandinskyV22Pipeline),
    "KandinskyV22Img2ImgPipeline": lambda: kandinsky(d.KandinskyV22Img2ImgPipeline, "image", strength=0.8),
    "KandinskyV22InpaintPipeline": lambda: kandinsky(
        d.KandinskyV22InpaintPipeline, unet=SEEN | {"in_channels": 9}, alone=True, image=picture(), mask_image=PAINTED
    ),
    "KandinskyV22ControlnetPipeline": lambda: kandinsky(
        d.KandinskyV22ControlnetPipeline, "hint", unet=HINTED, hint=True, size={"height": 64, "width": 64}
    ),
    "KandinskyV22CombinedPipeline": lambda: combined(d.KandinskyV22CombinedPipeline),
    "KandinskyV22Img2ImgCombinedPipeline": lambda: combined(
        d.KandinskyV22Img2ImgCombinedPipeline, alone=True, image=picture(), strength=0.8
    ),
    "Kandinsky3Pipeline": lambda: kandinsky3(d.Kandinsky3Pipeline, height=16, width=16),
    "Kandinsky3Img2ImgPipeline": lambda: kandinsky3(d.Kandinsky3Img2ImgPipeline, "image", strength=0.8),
    "MarigoldDepthPipeline": lambda: marigold(
        d.MarigoldDepthPipeline, 8, {"prediction_type": "depth", "scale_invariant": True, "shift_invariant": True}
    ),
    "MarigoldNormalsPipeline": lambda: marigold(d.MarigoldNormalsPipeline, 8, {"prediction_type": "normals"}),
    "MarigoldIntrinsicsPipeline": lambda: marigold(
        d.MarigoldIntrinsicsPipeline,
        12,
        {"prediction_type": "intrinsics", "target_properties": {"target_names": ["albedo", "shading"]}},
        8,
    ),
    "StableUnCLIPPipeline": lambda: unclip(d.StableUnCLIPPipeline),
    "StableUnCLIPImg2ImgPipeline": lambda: unclip(d.StableUnCLIPImg2ImgPipeline),
}
