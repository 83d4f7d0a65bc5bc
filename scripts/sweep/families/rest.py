"""What is in no other file: Shap-E, UnCLIP, Stable Audio 3, FramePack."""

from __future__ import annotations

import diffusers as d
import transformers as tr
from families import standins
from families.base import EULER, Builders, Case, make, mask, normal, picture, prompted, tiny, uniform, vae
from families.stable_diffusion import UNET, scheduler, sd
from families.unets import SIMPLE, prior
from families.video import hunyuan_video


def shap_e(kind, *, seen: bool) -> Case:
    from diffusers.pipelines.shap_e import ShapERenderer

    config = {"num_attention_heads": 2, "attention_head_dim": 16, "embedding_dim": 16, "num_embeddings": 32}
    config |= {"embedding_proj_dim": 16, "time_embed_dim": 64, "num_layers": 1, "clip_embed_dim": 32}
    config |= {"additional_embeddings": 0, "time_embed_act_fn": "gelu", "norm_in_type": "layer"}
    config |= {"encoder_hid_proj_type": None, "added_emb_type": None}
    shapes = ((8, 93), (8, 8), (8, 8), (8, 8))
    reader = {"text_encoder": standins.clip(16, projected=True), "tokenizer": standins.clip_tokenizer()}
    viewer = {"image_encoder": standins.clip_vision(16, projected=False), "image_processor": standins.clip_pictures()}
    pipe = make(
        kind,
        prior=tiny(d.PriorTransformer, **config | ({"embedding_proj_norm_type": "layer"} if seen else {})),
        shap_e_renderer=tiny(ShapERenderer, param_shapes=shapes, d_latent=16, d_hidden=8, n_output=12),
        scheduler=d.HeunDiscreteScheduler(beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True),
        **(viewer if seen else reader),
    )
    return Case(pipe, {"image": uniform(2, 3, 32, 32)} if seen else prompted(), {"frame_size": 32}, output="latent")


def unclip() -> Case:
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    down = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
    up = {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
    config = (
        SIMPLE | down | up | {"in_channels": 3, "out_channels": 6, "encoder_hid_dim": None, "attention_head_dim": 4}
    )
    config |= {"class_embed_type": "identity"}
    large = {
        "in_channels": 6,
        "out_channels": 6,
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
    }
    large |= {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
    joined = {"clip_embeddings_dim": 32, "time_embed_dim": 64, "cross_attention_dim": 32}
    learned = {"variance_type": "learned_range", "num_train_timesteps": 1000}
    pipe = make(
        d.UnCLIPPipeline,
        prior=prior()["prior"],
        decoder=tiny(d.UNet2DConditionModel, **config),
        text_proj=tiny(UnCLIPTextProjModel, **joined),
        text_encoder=standins.clip(projected=True),
        tokenizer=standins.clip_tokenizer(),
        super_res_first=tiny(d.UNet2DModel, norm_num_groups=4, **large),
        super_res_last=tiny(d.UNet2DModel, norm_num_groups=4, **large),
        prior_scheduler=d.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        decoder_scheduler=d.UnCLIPScheduler(**learned),
        super_res_scheduler=d.UnCLIPScheduler(**learned),
    )
    steps = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    return Case(pipe, prompted(), steps)


def stable_audio_3() -> Case:
    from transformers.models.t5gemma import modeling_t5gemma as m

    config = {"io_channels": 8, "patch_size": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 16}
    config |= {"global_cond_dim": 16, "local_add_cond_dim": 9, "timestep_features_dim": 16, "ff_mult": 2}
    config |= {"num_memory_tokens": 3, "use_differential_attention": False}
    coder = {"audio_channels": 2, "patch_size": 2, "encoder_channels": 8, "encoder_c_mults": (2,)}
    coder |= {"encoder_strides": (2,), "encoder_transformer_depths": (1,), "latent_dim": 8, "ff_mult": 2}
    coder |= {"use_differential_attention": False, "dim_heads": 4, "sampling_rate": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 8}
    module = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 512, **heads, **standins.TOKENS}
    whole = tr.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    pipe = make(
        d.StableAudio3Pipeline,
        transformer=tiny(d.StableAudio3DiTModel, **config),
        scheduler=EULER(num_train_timesteps=1, shift=1.0),
        vae=tiny(d.AutoencoderSAME, **coder),
        text_encoder=standins.random(m.T5GemmaEncoderModel, whole),
        tokenizer=standins.tokenizer(256, ends=False, bos=True),
        duration_embedder=tiny(StableAudio3DurationEmbedder, output_dim=16, fourier_dim=16),
    )
    return Case(pipe, prompted(), {"duration": 1.0})


def framepack() -> Case:
    config = {
        "patch_size": 2,
        "patch_size_t": 1,
        "has_image_proj": True,
        "image_proj_dim": 16,
        "has_clean_x_embedder": True,
    }
    sight = tr.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    parts = {
        "image_encoder": standins.random(tr.SiglipVisionModel, sight),
        "feature_extractor": tr.SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    }
    return hunyuan_video(
        d.HunyuanVideoFramepackPipeline,
        config,
        network=d.HunyuanVideoFramepackTransformer3DModel,
        parts=parts,
        alone=True,
        image=picture(32),
        height=32,
        width=32,
        latent_window_size=3,
        max_sequence_length=64,
    )


def alt_diffusion() -> Case:
    from diffusers.pipelines.deprecated.alt_diffusion import modeling_roberta_series as series

    own = {"hidden_size": 32, "project_dim": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = series.RobertaSeriesConfig(num_hidden_layers=2, max_position_embeddings=128, **own, **standins.TOKENS)
    reader = standins.random(series.RobertaSeriesModelWithTransformation, config)
    unet = tiny(d.UNet2DConditionModel, **UNET)
    parts = {"text_encoder": reader, "tokenizer": standins.tokenizer(), "scheduler": scheduler(), "unet": unet}
    pipe = make(d.AltDiffusionPipeline, vae=vae(), requires_safety_checker=False, **UNCHECKED, **parts)
    return Case(pipe)


def paint_by_example() -> Case:
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder

    own = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2}
    config = tr.CLIPVisionConfig(num_attention_heads=2, image_size=32, patch_size=8, **own)
    encoder = standins.random(PaintByExampleImageEncoder, config)
    unet = tiny(d.UNet2DConditionModel, **UNET | {"in_channels": 9})
    parts = {"image_encoder": encoder, "scheduler": scheduler(), "unet": unet, "safety_checker": None}
    parts |= {"feature_extractor": standins.clip_pictures()}
    pipe = make(d.PaintByExamplePipeline, vae=vae(), requires_safety_checker=False, **parts)
    shown = {"image": uniform(2, 3, 32, 32), "example_image": uniform(2, 3, 32, 32), "mask_image": mask(32)}
    return Case(pipe, shown)


def audioldm() -> Case:
    from families.audio import clap, vocoder

    own = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16}
    config = UNET | own | {"class_embeddings_concat": True, "cross_attention_dim": (16, 32)}
    pipe = make(
        d.AudioLDMPipeline,
        unet=tiny(d.UNet2DConditionModel, **config),
        scheduler=scheduler(),
        vae=vae(in_channels=1, out_channels=1),
        text_encoder=clap().text_model,
        tokenizer=standins.tokenizer(77),
        vocoder=vocoder(),
    )
    # Prompts come as embeddings: the pipeline wants an encoder with a projection that transformers has apart.
    return Case(
        pipe,
        {"prompt_embeds": normal(2, 16), "negative_prompt_embeds": normal(2, 16)},
        {"audio_length_in_s": 0.02},
    )


UNCHECKED = {"safety_checker": None, "feature_extractor": None}
PIPELINES: Builders = {
    "AltDiffusionPipeline": alt_diffusion,
    "PaintByExamplePipeline": paint_by_example,
    "AudioLDMPipeline": audioldm,
    "StableDiffusionGLIGENPipeline": lambda: sd(
        d.StableDiffusionGLIGENPipeline,
        unet={"attention_type": "gated"},
        gligen_phrases=["cube"],
        gligen_boxes=[[0.1, 0.1, 0.5, 0.5]],
        alone=True,
    ),
    "ShapEPipeline": lambda: shap_e(d.ShapEPipeline, seen=False),
    "ShapEImg2ImgPipeline": lambda: shap_e(d.ShapEImg2ImgPipeline, seen=True),
    "UnCLIPPipeline": unclip,
    "StableAudio3Pipeline": stable_audio_3,
    "HunyuanVideoFramepackPipeline": framepack,
}
