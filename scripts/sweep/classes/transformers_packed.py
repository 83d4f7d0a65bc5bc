"""Transformers of images that pack words and pictures into one sequence, or are given lists of latents."""

from __future__ import annotations

import torch

from .case import Draw, Table
from .transformers_tokens import HEADS, PLACES, tokens

PACKED = Table()
add = PACKED.add


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
