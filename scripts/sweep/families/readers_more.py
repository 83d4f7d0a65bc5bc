"""Second part of painters whose prompts are read by language models, and LTX-2, which makes video with sound."""

from __future__ import annotations

import diffusers as d
import transformers as tr
from families import standins
from families.base import EULER, Builders, Case, make, picture, pictures, prompted, tiny, uniform, wan_vae
from families.flux import flux2_vae
from families.readers import BLOCKS, SHORT, SIZE, ZIMAGE, qwen_tokenizer, qwen_vae, z_image


def hunyuan_image() -> Case:
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}
    config |= {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1)}
    config |= {"text_embed_dim": 16, "text_embed_2_dim": 32, "rope_axes_dim": (8, 8), "guidance_embeds": False}
    coder = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32)}
    coder |= {"layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.476986}
    pipe = make(
        d.HunyuanImagePipeline,
        transformer=tiny(d.HunyuanImageTransformer2DModel, **config),
        vae=tiny(d.AutoencoderKLHunyuanImage, **coder),
        scheduler=EULER(shift=7.0),
        text_encoder=standins.qwen_vl("2.5", layers=3),
        tokenizer=qwen_tokenizer(2048),
        text_encoder_2=standins.t5(),
        tokenizer_2=standins.tokenizer(128),
        guider=d.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
        ocr_guider=d.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
    )
    return Case(pipe, prompted(), {"height": 16, "width": 16}, alone=True)


def krea2() -> Case:
    config = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16}
    config |= {"num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 1}
    config |= {"text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    pipe = make(
        d.Krea2Pipeline,
        transformer=tiny(d.Krea2Transformer2DModel, axes_dims_rope=(8, 4, 4), **config),
        vae=qwen_vae(),
        scheduler=EULER(use_dynamic_shifting=True, max_image_seq_len=6400),
        text_encoder=standins.qwen_vl("3", part="model"),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=[0, 1, 2],
    )
    return Case(pipe, prompted(), SHORT)


def mistral3(kind=tr.Mistral3Model, layers=2):
    text = {"model_type": "mistral", "hidden_size": 16, "intermediate_size": 32, "head_dim": 8, **standins.TOKENS}
    sight = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    heads = {"num_attention_heads": 2, "num_hidden_layers": layers}
    config = tr.Mistral3Config(text_config=text | heads | {"num_key_value_heads": 2}, vision_config=sight | heads)
    return standins.random(kind, config)


def ernie() -> Case:
    config = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "in_channels": 4}
    config |= {"out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (8, 4, 4)}
    transformer = tiny(d.ErnieImageTransformer2DModel, patch_size=1, **config)
    reader = {"text_encoder": mistral3(), "tokenizer": standins.tokenizer(256, ends=False, bos=True)}
    pipe = make(d.ErnieImagePipeline, scheduler=EULER(), vae=flux2_vae(), transformer=transformer, **reader)
    return Case(pipe, prompted(), SIZE | {"use_pe": False})


def ideogram4() -> Case:
    config = {"in_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 13 * 16, "mrope_section": (4, 2, 2)}
    pipe = make(
        d.Ideogram4Pipeline,
        scheduler=EULER(),
        vae=flux2_vae(),
        # Features are taken from 13 of 36 layers.
        text_encoder=standins.qwen_vl("3", layers=36, part="model"),
        tokenizer=qwen_tokenizer(),
        transformer=tiny(d.Ideogram4Transformer2DModel, **config),
        unconditional_transformer=tiny(d.Ideogram4Transformer2DModel, **config),
    )
    return Case(pipe, prompted(), SHORT | {"guidance_schedule": (7.0, 3.0)})


def nucleus() -> Case:
    config = BLOCKS | {"num_layers": 2, "patch_size": 2, "in_channels": 16, "out_channels": 4}
    config |= {"joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}
    config |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "dense_moe_strategy": "leave_first_three_blocks_dense",
    }
    config |= {"num_experts": 4, "moe_intermediate_dim": 32, "capacity_factors": [2.0] * 4, "num_layers": 4}
    pipe = make(
        d.NucleusMoEImagePipeline,
        transformer=tiny(d.NucleusMoEImageTransformer2DModel, **config),
        vae=qwen_vae(),
        scheduler=EULER(),
        text_encoder=standins.qwen_vl("3", layers=8),
        processor=standins.PictureReader(),
    )
    return Case(pipe, prompted(), SHORT | {"return_index": -1})


def dreamlite(kind, **kwargs) -> Case:
    config = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "block_out_channels": (32, 64)}
    config |= {"down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D")}
    config |= {"up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), "layers_per_block": 1}
    config |= {"norm_num_groups": 8, "cross_attention_dim": 16, "attention_head_dim": 8}
    coder = {"encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32)}
    coder |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 4}
    pipe = make(
        kind,
        text_encoder=standins.qwen_vl("3"),
        tokenizer=qwen_tokenizer(),
        processor=standins.PictureReader(),
        vae=tiny(d.AutoencoderTiny, **coder),
        unet=tiny(d.DreamLiteUNetModel, **config),
        scheduler=EULER(),
    )
    size = {"height": 64, "width": 64, "max_sequence_length": 64}
    return Case(pipe, prompted(), size | kwargs, alone=True, plain=True)


def joy(kind, network, **kwargs) -> Case:
    config = {"patch_size": (1, 2, 2), "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2}
    config |= {"text_dim": 16, "num_layers": 1, "rope_dim_list": [4, 6, 6], "out_channels": 16}
    pipe = make(
        kind,
        transformer=tiny(network, **config),
        vae=wan_vae(),
        scheduler=EULER(),
        text_encoder=standins.qwen_vl("3"),
        tokenizer=qwen_tokenizer(),
        processor=standins.PictureReader(),
    )
    return Case(pipe, prompted(), SHORT | kwargs, alone=True)


def ltx2(kind, conditioning=None, **kwargs) -> Case:
    sound = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2}
    sound |= {"audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    config = {"in_channels": 4, "out_channels": 4, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 2}
    config |= {"attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16}
    config |= {"qk_norm": "rms_norm_across_heads", "rope_double_precision": False, "rope_type": "split"}
    joined = {"caption_channels": 16, "text_proj_in_factor": 3, "connector_rope_base_seq_len": 32}
    for name in ("video", "audio"):
        joined |= {f"{name}_connector_num_attention_heads": 2, f"{name}_connector_attention_head_dim": 8}
        joined |= {f"{name}_connector_num_layers": 1, f"{name}_connector_num_learnable_registers": None}
    coder = {"latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    coder |= {"layers_per_block": (1,), "decoder_layers_per_block": (1, 1), "spatio_temporal_scaling": (True,)}
    coder |= {"decoder_spatio_temporal_scaling": (True,), "decoder_inject_noise": (False, False)}
    coder |= {"downsample_type": ("spatial",), "upsample_residual": (False,), "upsample_factor": (1,)}
    coder |= {"timestep_conditioning": False, "patch_size": 1, "patch_size_t": 1, "decoder_causal": False}
    heard = {"base_channels": 4, "output_channels": 2, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": None}
    heard |= {"in_channels": 2, "resolution": 32, "latent_channels": 2, "norm_type": "pixel", "mel_bins": 8}
    heard |= {"causality_axis": "height", "mid_block_add_attention": False, "sample_rate": 16000}
    spoken = {"in_channels": 16, "hidden_channels": 32, "out_channels": 2, "upsample_kernel_sizes": [4, 4]}
    spoken |= {"upsample_factors": [2, 2], "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]]}
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    pipe = make(
        kind,
        transformer=tiny(d.LTX2VideoTransformer3DModel, **config | sound),
        connectors=tiny(LTX2TextConnectors, rope_type="split", rope_double_precision=False, **joined),
        vae=tiny(d.AutoencoderKLLTX2Video, **coder),
        audio_vae=tiny(d.AutoencoderKLLTX2Audio, mel_hop_length=160, **heard),
        vocoder=tiny(LTX2Vocoder, output_sampling_rate=16000, **spoken),
        scheduler=EULER(),
        text_encoder=gemma3(),
        tokenizer=standins.tokenizer(64, ends=False, bos=True, side="left"),
    )
    fixed = {"num_frames": 5, "frame_rate": 25.0, "max_sequence_length": 16, "guidance_scale": 3.0}
    plain = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "spatio_temporal_guidance_blocks": None}
    return Case(pipe, conditioning or prompted(), SIZE | fixed | plain | kwargs)


def gemma3():
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, **standins.TOKENS}
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 28, "patch_size": 14}
    config = tr.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    return standins.random(tr.Gemma3ForConditionalGeneration, config)


def z_control() -> object:
    own = {"control_layers_places": [0, 1], "control_refiner_layers_places": [0], "control_in_dim": 16}
    config = {
        name: value
        for name, value in ZIMAGE.items()
        if name in ("all_patch_size", "all_f_patch_size", "dim", "n_refiner_layers", "n_heads", "n_kv_heads")
    }
    return tiny(d.ZImageControlNetModel, **config | own)


PIPELINES: Builders = {
    "HunyuanImagePipeline": hunyuan_image,
    "Krea2Pipeline": krea2,
    "ErnieImagePipeline": ernie,
    "Ideogram4Pipeline": ideogram4,
    "NucleusMoEImagePipeline": nucleus,
    "DreamLitePipeline": lambda: dreamlite(d.DreamLitePipeline),
    "DreamLiteMobilePipeline": lambda: dreamlite(d.DreamLiteMobilePipeline),
    "JoyImageEditPipeline": lambda: joy(d.JoyImageEditPipeline, d.JoyImageEditTransformer3DModel, image=picture(32)),
    "JoyImageEditPlusPipeline": lambda: joy(
        d.JoyImageEditPlusPipeline, d.JoyImageEditPlusTransformer3DModel, images=pictures(32)
    ),
    "LTX2Pipeline": lambda: ltx2(d.LTX2Pipeline),
    "LTX2ImageToVideoPipeline": lambda: ltx2(
        d.LTX2ImageToVideoPipeline, prompted(image=uniform(2, 3, 32, 32)), image_crf=0
    ),
    "ZImageControlNetPipeline": lambda: z_image(d.ZImageControlNetPipeline, "control_image", control=z_control),
}
