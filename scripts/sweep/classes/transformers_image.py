"""Transformers that make an image from a latent [batch, channels, height, width]."""

from __future__ import annotations

import torch

from .case import Draw, Table

IMAGES = Table()
add = IMAGES.add

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}  # 64 wide
WIDE = {"num_attention_heads": 6}  # a multiple of 3, for models that split an embedding in three


def words(d: Draw, width: int = 64, length: int = 8, **more) -> dict:
    """Text, and a time for each sample."""
    return {"encoder_hidden_states": d.normal(length, width), "timestep": d.steps(), **more}


def sizes(d: Draw) -> dict:
    """What CogView's models are told of the picture's size."""
    return {"original_size": d.full([64, 64]), "target_size": d.full([64, 64]), "crop_coords": d.full([0, 0])}


add(
    "DiTTransformer2DModel",
    HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 8},
    lambda d: {"hidden_states": d.normal(4, 8, 8), "timestep": d.steps(), "class_labels": d.integers(8)},
)

PIXART = HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 64}
add(
    "PixArtTransformer2DModel",
    PIXART | {"caption_channels": 64, "use_additional_conditions": False},
    lambda d: words(d, hidden_states=d.normal(4, 8, 8), encoder_attention_mask=d.ones(8)),
)
add(
    "PixArtTransformer2DModel",
    PIXART | WIDE | {"cross_attention_dim": 192, "caption_channels": 64, "use_additional_conditions": True},
    lambda d: words(
        d,
        hidden_states=d.normal(4, 8, 8),
        added_cond_kwargs={"resolution": d.full([8, 8]), "aspect_ratio": d.full([1.0])},
    ),
    "sizes",
)

PATCHES = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "patch_size": 2, "sample_size": 8}
add(
    "Transformer2DModel",
    PATCHES | {"num_embeds_ada_norm": 8, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False},
    lambda d: {"hidden_states": d.normal(4, 8, 8), "timestep": d.steps(), "class_labels": d.integers(8)},
    "patches",
)
add(
    "Transformer2DModel",
    HEADS | {"in_channels": 32, "norm_num_groups": 8, "num_layers": 2, "cross_attention_dim": 64},
    lambda d: {"hidden_states": d.normal(32, 8, 8), "encoder_hidden_states": d.normal(8, 64)},
    "continuous",
)
add(
    "Transformer2DModel",
    HEADS
    | {"num_vector_embeds": 16, "sample_size": 4, "num_layers": 2, "cross_attention_dim": 64}
    | {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm"},
    lambda d: words(d, hidden_states=d.integers(15, 16), timestep=d.steps()[0]),
    "vectors",
)
add(
    "DreamLiteTransformer2DModel",
    HEADS | {"in_channels": 32, "norm_num_groups": 8, "num_layers": 2, "cross_attention_dim": 64},
    lambda d: {"hidden_states": d.normal(32, 8, 8), "encoder_hidden_states": d.normal(8, 64)},
)

HUNYUAN = HEADS | {"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 64, "num_layers": 4}
HUNYUAN |= {"cross_attention_dim": 64, "cross_attention_dim_t5": 64, "pooled_projection_dim": 64}
HUNYUAN |= {"text_len": 4, "text_len_t5": 4, "activation_fn": "gelu-approximate"}


def hunyuan_dit(d: Draw) -> dict:
    rotary = (d.alone(16, 32).cos(), d.alone(16, 32).sin())
    return words(
        d,
        hidden_states=d.normal(4, 8, 8),
        encoder_hidden_states=d.normal(4, 64),
        text_embedding_mask=d.ones(4),
        encoder_hidden_states_t5=d.normal(4, 64),
        text_embedding_mask_t5=d.ones(4),
        timestep=d.steps().float(),
        image_meta_size=d.full([1024, 1024, 64, 64, 0, 0]),
        style=d.integers(1),
        image_rotary_emb=rotary,
    )


add("HunyuanDiT2DModel", HUNYUAN, hunyuan_dit)

ANGLES = torch.arange(16)[:, None] * torch.logspace(0, -2, 4)[None]  # of 16 rows or columns
PLACES = torch.polar(
    torch.ones(16, 16, 8), torch.cat([ANGLES[:, None].expand(16, 16, 4), ANGLES[None].expand(16, 16, 4)], 2)
)
LUMINA = {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4}
add(
    "LuminaNextDiT2DModel",
    LUMINA | {"num_kv_heads": 2, "multiple_of": 64, "learn_sigma": False, "cross_attention_dim": 64, "qk_norm": True},
    lambda d: {
        "hidden_states": d.normal(4, 8, 8),
        "timestep": d.uniform(),
        "encoder_hidden_states": d.normal(8, 64),
        "encoder_mask": d.ones(8),
        "image_rotary_emb": PLACES,
        "cross_attention_kwargs": {},
    },
)
add(
    "Lumina2Transformer2DModel",
    LUMINA
    | {"num_kv_heads": 2, "num_refiner_layers": 1, "multiple_of": 64, "cap_feat_dim": 64}
    | {"axes_dim_rope": (8, 4, 4), "axes_lens": (64, 64, 64)},
    lambda d: {
        "hidden_states": d.normal(4, 8, 8),
        "timestep": d.uniform(),
        "encoder_hidden_states": d.normal(8, 64),
        "encoder_attention_mask": d.ones(8).bool(),
    },
)

SANA = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 1}
SANA |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
SANA |= {"caption_channels": 64, "mlp_ratio": 2.0}
add("SanaTransformer2DModel", SANA, lambda d: words(d, hidden_states=d.normal(4, 8, 8)))
add(
    "SanaTransformer2DModel",
    SANA | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    lambda d: words(d, hidden_states=d.normal(4, 8, 8), timestep=d.uniform(), guidance=d.uniform()),
    "guidance",
)

SD3 = HEADS | {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
SD3 |= {"caption_projection_dim": 64, "joint_attention_dim": 64, "pooled_projection_dim": 64}
SD3 |= {"pos_embed_max_size": 16}
for variant, more in {
    "": {},
    "3.5, dual attention": {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
}.items():
    add(
        "SD3Transformer2DModel",
        SD3 | more,
        lambda d: words(d, hidden_states=d.normal(4, 8, 8), pooled_projections=d.normal(64)),
        variant,
    )

add(
    "AuraFlowTransformer2DModel",
    HEADS
    | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    | {"caption_projection_dim": 64, "joint_attention_dim": 64, "pos_embed_max_size": 64},
    lambda d: words(d, hidden_states=d.normal(4, 8, 8), timestep=d.uniform()),
)

COGVIEW = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 64, "time_embed_dim": 64}
add(
    "CogView3PlusTransformer2DModel",
    COGVIEW | {"condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8},
    lambda d: words(d, hidden_states=d.normal(4, 8, 8), **sizes(d)),
)
add(
    "CogView4Transformer2DModel",
    COGVIEW | {"condition_dim": 8},
    lambda d: words(d, hidden_states=d.normal(4, 8, 8), **sizes(d)),
)
add(
    "GlmImageTransformer2DModel",
    COGVIEW | {"condition_dim": 8, "prior_vq_quantizer_codebook_size": 64},
    lambda d: words(
        d,
        hidden_states=d.normal(4, 8, 8),
        prior_token_id=d.integers(64, 16),
        prior_token_drop=d.ones(16).bool().logical_not(),
        target_size=d.full([8, 8]),
        crop_coords=d.full([0, 0]),
    ),
)
add(
    "PRXTransformer2DModel",
    {"in_channels": 4, "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2}
    | {"axes_dim": [16, 16]},
    lambda d: words(d, hidden_states=d.normal(4, 8, 8), timestep=d.uniform()),
)
add(
    "ErnieImageTransformer2DModel",
    {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 128, "in_channels": 4}
    | {"out_channels": 4, "patch_size": 1, "text_in_dim": 64, "rope_axes_dim": (16, 8, 8)},
    lambda d: {
        "hidden_states": d.normal(4, 4, 4),
        "timestep": d.steps().float(),
        "text_bth": d.normal(8, 64),
        "text_lens": d.integers(1) + 8,
    },
)
