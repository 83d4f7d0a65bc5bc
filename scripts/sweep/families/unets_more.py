"""U-Nets, second part: Stable Cascade, Wuerstchen, latent upscalers, IP-Adapter, pipelines that diffusers retired."""

from __future__ import annotations

import diffusers as d
import torch
from families import standins
from families.base import Builders, Case, make, normal, prompted, tiny, uniform, vae
from families.stable_diffusion import UNET, scheduler, sd, xl
from families.unets import unet2d


def words(prefix: str = "") -> dict:
    return {f"{prefix}text_encoder": standins.clip(projected=True), f"{prefix}tokenizer": standins.clip_tokenizer()}


def cascade_prior():
    config = {"in_channels": 16, "out_channels": 16, "conditioning_dim": 32, "block_out_channels": (32, 32)}
    config |= {"num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1)}
    config |= {"clip_image_in_channels": 32, "clip_text_in_channels": 32, "clip_text_pooled_in_channels": 32}
    return tiny(d.StableCascadeUNet, switch_level=(False,), **config)


def cascade_decoder():
    plain = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    config = {"in_channels": 4, "out_channels": 4, "conditioning_dim": 32, "block_out_channels": (16, 32)}
    config |= {"num_attention_heads": (-1, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1)}
    config |= {"down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (2, 1), "switch_level": None}
    config |= {"clip_text_pooled_in_channels": 32, "effnet_in_channels": 16, "dropout": (0.1, 0.1), "kernel_size": 3}
    return tiny(d.StableCascadeUNet, block_types_per_layer=(plain, (*plain, "SDCascadeAttnBlock")), **config)


def paella():
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    return tiny(PaellaVQModel, bottleneck_blocks=1, num_vq_embeddings=2, levels=2, embed_dim=16)


def stable_cascade(which: str, steps=d.DDPMWuerstchenScheduler) -> Case:
    """With its own sampler a random network's samples grow without end; one that clips them shows trained ones."""
    first = {"prior": cascade_prior(), "scheduler": steps(), **words()}
    second = {"decoder": cascade_decoder(), "scheduler": steps(), "vqgan": paella(), **words()}
    if which == "prior":
        pipe = make(d.StableCascadePriorPipeline, resolution_multiple=16.0, **first)
        return Case(pipe, prompted(), {"height": 64, "width": 64})
    if which == "decoder":
        pipe = make(d.StableCascadeDecoderPipeline, latent_dim_scale=4.0, **second)
        return Case(pipe, prompted(image_embeddings=normal(2, 16, 4, 4)), {"guidance_scale": 2.0})
    none = {"prior_feature_extractor": None, "prior_image_encoder": None}
    named = {f"prior_{name}": part for name, part in first.items()}
    pipe = make(d.StableCascadeCombinedPipeline, **second, **named, **none)
    return Case(pipe, prompted(), {"height": 128, "width": 128, "prior_num_inference_steps": 2})


def wuerstchen(which: str) -> Case:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

    steps, reader = (
        d.DDPMWuerstchenScheduler,
        {"text_encoder": standins.clip(), "tokenizer": standins.clip_tokenizer()},
    )
    if which == "prior":
        network = tiny(WuerstchenPrior, c_in=4, c=32, depth=2, c_cond=32, c_r=16, nhead=2)
        pipe = make(
            d.WuerstchenPriorPipeline, prior=network, scheduler=steps(), latent_mean=1.0, latent_std=1.0, **reader
        )
        return Case(pipe, prompted(), {"height": 128, "width": 128})
    config = {
        "c_cond": 32,
        "c_hidden": [32],
        "nhead": [2],
        "blocks": [2],
        "level_config": ["CTA"],
        "inject_effnet": [True],
    }
    network = tiny(WuerstchenDiffNeXt, clip_embd=32, **config)
    pipe = make(
        d.WuerstchenDecoderPipeline,
        decoder=network,
        vqgan=paella(),
        scheduler=steps(),
        latent_dim_scale=4.0,
        **reader,
    )
    return Case(pipe, prompted(image_embeddings=normal(2, 16, 4, 4)), {"guidance_scale": 0.0}, alone=True)


def image_variation() -> Case:
    pipe = make(
        d.StableDiffusionImageVariationPipeline,
        unet=tiny(d.UNet2DConditionModel, **UNET),
        vae=vae(),
        scheduler=scheduler(),
        image_encoder=standins.clip_vision(),
        safety_checker=None,
        feature_extractor=standins.clip_pictures(),
        requires_safety_checker=False,
    )
    return Case(pipe, {"image": uniform(2, 3, 32, 32)})


def latent_upscale() -> Case:
    config = {
        "in_channels": 8,
        "out_channels": 5,
        "act_fn": "gelu",
        "layers_per_block": 1,
        "block_out_channels": [32, 32, 64, 64],
    }
    config |= {"down_block_types": ("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3), "mid_block_type": None}
    config |= {
        "up_block_types": (*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": None,
    }
    config |= {"attention_head_dim": 8, "conv_in_kernel": 1, "conv_out_kernel": 1, "time_cond_proj_dim": 160}
    config |= {
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
    }
    pipe = make(
        d.StableDiffusionLatentUpscalePipeline,
        unet=tiny(d.UNet2DConditionModel, **config),
        vae=vae(4),
        scheduler=d.EulerDiscreteScheduler(prediction_type="sample"),
        text_encoder=standins.clip(),
        tokenizer=standins.clip_tokenizer(),
    )
    return Case(pipe, prompted(image=normal(2, 4, 16, 16)))


def ldm_text() -> Case:
    unet = tiny(d.UNet2DConditionModel, **UNET)
    reader = {"bert": standins.clip(), "tokenizer": standins.clip_tokenizer()}
    pipe = make(d.LDMTextToImagePipeline, vqvae=vae(), unet=unet, scheduler=scheduler(), **reader)
    return Case(pipe, prompted(), {"height": 16, "width": 16})


def ldm_super() -> Case:
    halves = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    coder = tiny(d.VQModel, block_out_channels=[32, 32], latent_channels=3, **halves)
    pipe = make(d.LDMSuperResolutionPipeline, vqvae=coder, unet=unet2d(in_channels=6), scheduler=d.DDIMScheduler())
    return Case(pipe, {"image": 2 * uniform(2, 3, 16, 16) - 1})


def ip_adapter(kind: type, build) -> Case:
    """A pipeline with an IP-Adapter of random weights, which is given the embeddings of a picture."""
    case = build(kind)
    unet = case.pipe.unet
    weights = {"proj.weight": torch.randn(4 * 32, 32) * 0.1, "proj.bias": torch.zeros(4 * 32)}
    cross = unet.config.cross_attention_dim
    weights = {"proj.weight": torch.randn(4 * cross, 32) * 0.1, "proj.bias": torch.zeros(4 * cross)}
    norm = {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    keys = {}
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossing):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for side in ("k", "v"):
            keys[f"{2 * index + 1}.to_{side}_ip.weight"] = torch.randn(width, cross) * cross**-0.5
    unet._load_ip_adapter_weights([{"image_proj": weights | norm, "ip_adapter": keys}])
    return Case(case.pipe, case.conditioning, {"ip_adapter_image_embeds": [normal(2, 1, 32)]}, alone=True)


def dancing() -> Case:
    halves = {"down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D")}
    halves |= {"up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip")}
    config = {"block_out_channels": (32, 32), "extra_in_channels": 64, "sample_size": 512, "sample_rate": 16000}
    config |= {"in_channels": 2, "out_channels": 2, "flip_sin_to_cos": True, "use_timestep_embedding": False}
    unet = tiny(d.UNet1DModel, time_embedding_type="fourier", mid_block_type="UNetMidBlock1D", **config | halves)
    return Case(make(d.DanceDiffusionPipeline, unet=unet, scheduler=d.IPNDMScheduler()), {})


def text_to_video(kind, **kwargs) -> Case:
    config = {"block_out_channels": (16, 32), "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 4}
    config |= {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 4}
    config |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 32}
    reader = {"text_encoder": standins.clip(), "tokenizer": standins.clip_tokenizer()}
    unet = tiny(d.UNet3DConditionModel, **config)
    return Case(make(kind, unet=unet, vae=vae(), scheduler=scheduler(), **reader), prompted(), kwargs)


def latent_unconditional() -> Case:
    halves = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    coder = tiny(d.VQModel, block_out_channels=[32, 32], latent_channels=3, **halves)
    return Case(make(d.LDMPipeline, vqvae=coder, unet=unet2d(), scheduler=d.DDIMScheduler()), {})


PIPELINES: Builders = {
    "StableCascadePriorPipeline": lambda: stable_cascade("prior"),
    "StableCascadeDecoderPipeline": lambda: stable_cascade("decoder"),
    "StableCascadeCombinedPipeline": lambda: stable_cascade("combined"),
    "StableCascadePriorPipeline, clipped": lambda: stable_cascade("prior", d.DDPMScheduler),
    "StableCascadeDecoderPipeline, clipped": lambda: stable_cascade("decoder", d.DDPMScheduler),
    "StableCascadeCombinedPipeline, clipped": lambda: stable_cascade("combined", d.DDPMScheduler),
    "WuerstchenPriorPipeline": lambda: wuerstchen("prior"),
    "WuerstchenDecoderPipeline": lambda: wuerstchen("decoder"),
    "StableDiffusionImageVariationPipeline": image_variation,
    "StableDiffusionLatentUpscalePipeline": latent_upscale,
    "LDMTextToImagePipeline": ldm_text,
    "LDMSuperResolutionPipeline": ldm_super,
    "StableDiffusionPipeline, IP-Adapter": lambda: ip_adapter(d.StableDiffusionPipeline, sd),
    "StableDiffusionXLPipeline, IP-Adapter": lambda: ip_adapter(d.StableDiffusionXLPipeline, xl),
    "LDMPipeline": latent_unconditional,
    "DanceDiffusionPipeline": dancing,
    "PNDMPipeline": lambda: Case(
        make(d.PNDMPipeline, unet=unet2d(), scheduler=d.PNDMScheduler(skip_prk_steps=True)), {}
    ),
    "TextToVideoSDPipeline": lambda: text_to_video(d.TextToVideoSDPipeline, num_frames=2),
    "StableDiffusionSAGPipeline": lambda: sd(d.StableDiffusionSAGPipeline, alone=True),
    "StableDiffusionPanoramaPipeline": lambda: sd(d.StableDiffusionPanoramaPipeline, alone=True, height=16, width=16),
    "SemanticStableDiffusionPipeline": lambda: sd(d.SemanticStableDiffusionPipeline),
}
