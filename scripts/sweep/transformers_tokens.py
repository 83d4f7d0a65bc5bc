"""Transformers of images that are given tokens, lists of latents, or where their tokens lie."""

from __future__ import annotations

import torch

from .case import Draw, Table, grid

TOKENS = Table()
add = TOKENS.add

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
JOINT = HEADS | {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64}
PLACES = grid(1, 4, 4)  # of 16 image tokens; 8 words lie at 0
WHERE = {"img_ids": PLACES, "txt_ids": torch.zeros(8, 3)}


def tokens(d: Draw, channels: int = 4, **more) -> dict:
    """16 image tokens, 8 words, a time in (0, 1)."""
    hidden, text = d.normal(16, channels), d.normal(8, 64)
    return {"hidden_states": hidden, "encoder_hidden_states": text, "timestep": d.uniform(), **more}


FLUX = JOINT | {"patch_size": 1, "pooled_projection_dim": 64, "axes_dims_rope": (8, 12, 12)}
add("FluxTransformer2DModel", FLUX, lambda d: tokens(d, pooled_projections=d.normal(64), **WHERE))
add(
    "FluxTransformer2DModel",
    FLUX | {"guidance_embeds": True},
    lambda d: tokens(d, pooled_projections=d.normal(64), guidance=d.uniform(), **WHERE),
    "guidance",
)
add(
    "FluxTransformer2DModel",
    FLUX | {"num_layers": 2, "num_single_layers": 2},
    lambda d: tokens(
        d,
        pooled_projections=d.normal(64),
        controlnet_block_samples=[d.normal(16, 64)],
        controlnet_single_block_samples=[d.normal(16, 64)],
        **WHERE,
    ),
    "with a ControlNet",
)

FOUR = JOINT | {"patch_size": 1, "axes_dims_rope": (8, 8, 8, 8)}


def flux2(d: Draw, **more) -> dict:
    places = grid(1, 4, 4, 1).expand(d.batch, -1, -1)
    words = grid(1, 1, 1, 8).expand(d.batch, -1, -1)
    return tokens(d, img_ids=places, txt_ids=words, **more)


add("Flux2Transformer2DModel", FOUR, lambda d: flux2(d, guidance=d.uniform()))
add("Flux2Transformer2DModel", FOUR | {"guidance_embeds": False}, flux2, "without guidance")
FLUX3 = JOINT | {"cond_in_channels": 4, "axes_dims_rope": (8, 8, 8, 8)}
FLUX3_WHERE = {"img_ids": grid(1, 4, 4, 1), "txt_ids": grid(1, 1, 1, 8)}
add("Flux3Transformer2DModel", FLUX3, lambda d: tokens(d, **FLUX3_WHERE))
add(
    "Flux3Transformer2DModel",
    FLUX3 | {"flow_map": True},
    lambda d: tokens(
        d,
        image_cond_hidden_states=d.normal(16, 4),
        image_cond_ids=grid(1, 4, 4, 1),
        target_timestep=d.uniform() / 10,
        **FLUX3_WHERE,
    ),
    "flow map, a reference image",
)
add(
    "ChromaTransformer2DModel",
    JOINT
    | {"axes_dims_rope": (8, 12, 12), "approximator_num_channels": 64, "approximator_hidden_dim": 64}
    | {"approximator_layers": 1},
    lambda d: tokens(d, **WHERE),
)
add(
    "BriaTransformer2DModel",
    JOINT | {"patch_size": 1, "pooled_projection_dim": None, "axes_dims_rope": (8, 12, 12)},
    lambda d: tokens(d, **WHERE),
)
add(
    "BriaFiboTransformer2DModel",
    JOINT | {"patch_size": 1, "pooled_projection_dim": None, "text_encoder_dim": 32, "axes_dims_rope": (8, 12, 12)},
    lambda d: tokens(d, text_encoder_layers=[d.normal(8, 32), d.normal(8, 32)], **WHERE),
)
add(
    "BriaFibo2Transformer2DModel",
    {"in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 128}
    | {"injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8}
    | {"gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": (8, 12, 12)}
    | {"axes_lens": (64, 32, 32)},
    lambda d: {
        "hidden_states": d.normal(4, 8, 8),
        "timestep": d.uniform(),
        "encoder_hidden_states": d.normal(2, 8, 128),
    },
)
add(
    "LongCatImageTransformer2DModel",
    JOINT | {"patch_size": 1, "pooled_projection_dim": 64, "axes_dims_rope": (8, 12, 12)},
    lambda d: tokens(d, guidance=d.uniform(), **WHERE),
)
add(
    "OvisImageTransformer2DModel",
    JOINT | {"patch_size": 1, "out_channels": 4, "axes_dims_rope": (8, 12, 12)},
    lambda d: tokens(d, **WHERE),
)

QWEN = HEADS | {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 64}
QWEN |= {"axes_dims_rope": (8, 12, 12)}


def qwen(d: Draw, **more) -> dict:
    mask, shapes = d.ones(8, dtype=torch.long), [[(1, 4, 4)]] * d.batch
    return tokens(d, 16, encoder_hidden_states_mask=mask) | {"img_shapes": shapes} | more


add("QwenImageTransformer2DModel", QWEN | {"patch_size": 2}, qwen)
TWO = [(1, 2, 4), (1, 2, 4)]  # pictures of 8 tokens
add(
    "QwenImageTransformer2DModel",
    QWEN | {"patch_size": 2, "use_additional_t_cond": True, "use_layer3d_rope": True},
    lambda d: qwen(d, img_shapes=[TWO] * d.batch, additional_t_cond=d.integers(1)),
    "layered",
)
add(
    "QwenImageTransformer2DModel",
    QWEN | {"patch_size": 2, "zero_cond_t": True},
    lambda d: qwen(d, img_shapes=[TWO] * d.batch),
    "edit",
)
add(
    "QwenImage21Transformer2DModel",
    HEADS
    | {"in_channels": 16, "out_channels": 16, "num_layers": 2, "context_in_dim": 64, "axes_dims_rope": (8, 12, 12)},
    lambda d: tokens(d, 16, img_mask=d.full([0] * 8 + [1] * 4).bool(), img_shapes=[[(1, 4, 4)]] * d.batch),
)
add(
    "NucleusMoEImageTransformer2DModel",
    QWEN | {"patch_size": 2, "moe_enabled": False, "capacity_factors": [8.0, 8.0]},
    lambda d: qwen(d, img_shapes=[(1, 4, 4)] * d.batch),
)
add(
    "NucleusMoEImageTransformer2DModel",
    QWEN
    | {
        "patch_size": 2,
        "moe_enabled": True,
        "num_experts": 4,
        "moe_intermediate_dim": 64,
        "dense_moe_strategy": "leave_first_block_dense",
    }
    | {"capacity_factors": [2.0, 2.0]},
    lambda d: qwen(d, img_shapes=[(1, 4, 4)] * d.batch),
    "experts",
)

HUNYUAN = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
HUNYUAN |= {"num_refiner_layers": 1, "patch_size": (1, 1), "text_embed_dim": 64, "rope_axes_dim": (16, 16)}


def hunyuan(d: Draw, **more) -> dict:
    step, mask = d.steps().float(), d.ones(8)
    return tokens(d) | {"hidden_states": d.normal(4, 4, 4), "timestep": step, "encoder_attention_mask": mask} | more


add("HunyuanImageTransformer2DModel", HUNYUAN, hunyuan)
add(
    "HunyuanImageTransformer2DModel",
    HUNYUAN | {"text_embed_2_dim": 64, "guidance_embeds": True, "use_meanflow": True},
    lambda d: hunyuan(
        d,
        timestep_r=d.steps().float(),
        guidance=d.steps().float(),
        encoder_hidden_states_2=d.normal(4, 64),
        encoder_attention_mask_2=d.ones(4),
    ),
    "two texts, guidance, mean flow",
)


def ideogram(d: Draw) -> dict:
    """4 words, then 16 image tokens, in one sequence."""
    zeros, picture = torch.zeros(d.batch, 4, 16), d.normal(16, 16)
    text = torch.cat([d.normal(4, 64), torch.zeros(d.batch, 16, 64)], 1)
    places = torch.cat([torch.arange(4)[:, None].expand(4, 3), 1000 + PLACES.long()])
    kinds = torch.tensor([3] * 4 + [2] * 16)
    return {
        "hidden_states": torch.cat([zeros, picture], 1),
        "encoder_hidden_states": text,
        "timestep": d.uniform(),
        "position_ids": places.expand(d.batch, -1, -1),
        "segment_ids": d.ones(20, dtype=torch.long),
        "indicator": kinds.expand(d.batch, -1),
    }


add(
    "Ideogram4Transformer2DModel",
    HEADS
    | {"in_channels": 16, "num_layers": 2, "intermediate_size": 128, "adaln_dim": 64, "llm_features_dim": 64}
    | {"mrope_section": (8, 4, 4)},
    ideogram,
)
add(
    "Krea2Transformer2DModel",
    HEADS
    | {"in_channels": 16, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 128}
    | {"timestep_embed_dim": 64, "text_hidden_dim": 64, "num_text_layers": 3, "text_num_attention_heads": 2}
    | {"text_num_key_value_heads": 1, "text_intermediate_size": 64, "num_layerwise_text_blocks": 1}
    | {"num_refiner_text_blocks": 1, "axes_dims_rope": (16, 8, 8)},
    lambda d: {
        "hidden_states": d.normal(16, 16),
        "encoder_hidden_states": d.normal(8, 3, 64),
        "timestep": d.uniform(),
        "position_ids": torch.cat([torch.zeros(8, 3), PLACES]),
        "encoder_attention_mask": d.ones(8).bool(),
    },
)
add(
    "HiDreamImageTransformer2DModel",
    HEADS
    | {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
    | {"caption_channels": [64, 64], "text_emb_dim": 64, "num_routed_experts": 2, "num_activated_experts": 1}
    | {
        "axes_dims_rope": (16, 8, 8),
        "max_resolution": (8, 8),
        "llama_layers": (0, 1),
        "force_inference_output": True,
    },
    lambda d: {
        "hidden_states": d.normal(4, 8, 8),
        "timesteps": d.steps(),
        "encoder_hidden_states_t5": d.normal(8, 64),
        "encoder_hidden_states_llama3": d.alone(2, d.batch, 8, 64),
        "pooled_embeds": d.normal(64),
    },
)
add(
    "OmniGenTransformer2DModel",
    {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128}
    | {"num_layers": 2, "pad_token_id": 0, "vocab_size": 100, "in_channels": 4, "time_step_dim": 64}
    | {"rope_scaling": {"long_factor": list(range(1, 17)), "short_factor": list(range(1, 17))}},
    lambda d: {
        "hidden_states": d.normal(4, 8, 8),
        "timestep": d.uniform(),
        "input_ids": d.integers(10, 24),
        "input_img_latents": [d.alone(1, 4, 8, 8)],
        "input_image_sizes": {0: [[0, 16]]},
        "attention_mask": d.ones(41, 41),
        "position_ids": torch.arange(41).expand(d.batch, -1),
    },
)
Z_IMAGE = {"in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
Z_IMAGE |= {"cap_feat_dim": 64, "axes_dims": [8, 12, 12], "axes_lens": [256, 32, 32]}
add(
    "ZImageTransformer2DModel",
    Z_IMAGE,
    lambda d: {
        "x": [d.alone(4, 1, 8, 8) for _ in range(d.batch)],
        "cap_feats": [d.alone(8 + i, 64) for i in range(d.batch)],
        "t": d.uniform(),
    },
)

JOY = {"patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 64, "num_attention_heads": 2, "text_dim": 64}
JOY |= {"num_layers": 2, "rope_dim_list": [8, 12, 12]}
add("JoyImageEditTransformer3DModel", JOY, lambda d: tokens(d, hidden_states=d.normal(4, 1, 8, 8)))
add(
    "JoyImageEditPlusTransformer3DModel",
    JOY,
    lambda d: tokens(
        d, hidden_states=d.normal(8, 4, 1, 2, 2), shape_list=[[(1, 2, 2), (1, 2, 2)] for _ in range(d.batch)]
    ),
)
