"""Transformers of images that are given tokens, and where they lie."""

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
