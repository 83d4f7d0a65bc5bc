"""Transformers of sound, of embeddings and of molecules."""

from __future__ import annotations

import torch
from torch import nn

from .case import Draw, Table

OTHER = Table()
add = OTHER.add

add(
    "AceStepTransformer1DModel",
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 32, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "patch_size": 2}
    | {"sliding_window": 16},
    lambda d: {
        "hidden_states": d.normal(8, 8),
        "timestep": d.uniform(),
        "timestep_r": d.uniform() / 10,
        "encoder_hidden_states": d.normal(10, 64),
        "context_latents": d.normal(8, 16),
    },
)
add(
    "StableAudioDiTModel",
    {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 32}
    | {"num_attention_heads": 2, "num_key_value_attention_heads": 1, "cross_attention_dim": 64, "time_proj_dim": 64}
    | {"global_states_input_dim": 64, "cross_attention_input_dim": 64},
    lambda d: {
        "hidden_states": d.normal(4, 16),
        "timestep": d.uniform(),
        "encoder_hidden_states": d.normal(8, 64),
        "global_hidden_states": d.normal(1, 64),
        "rotary_embedding": rotary(17, 16),
    },
)


def rotary(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (torch.arange(length)[:, None] * torch.logspace(0, -2, width // 2)[None]).repeat(1, 2)
    return angles.cos(), angles.sin()


SOUND = {"io_channels": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "cond_token_dim": 64, "global_cond_dim": 64}
SOUND |= {"local_add_cond_dim": 5, "timestep_features_dim": 64, "ff_mult": 2, "num_memory_tokens": 3}


def stable_audio3(d: Draw, **more) -> dict:
    return {
        "hidden_states": d.normal(8, 16),
        "timestep": d.uniform(),
        "encoder_hidden_states": d.normal(4, 64),
        "global_hidden_states": d.normal(64),
        **more,
    }


NAME = "StableAudio3DiTModel"
add(NAME, SOUND | {"use_differential_attention": False}, stable_audio3)
add(
    NAME,
    SOUND | {"use_differential_attention": True},
    lambda d: stable_audio3(d, local_add_cond=d.normal(5, 16)),
    "differential attention, inpainting",
)
add(
    "LongCatAudioDiTTransformer",
    {"dit_dim": 64, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 64, "latent_dim": 8, "text_conv": False},
    lambda d: {
        "hidden_states": d.normal(16, 8),
        "encoder_hidden_states": d.normal(10, 64),
        "encoder_attention_mask": d.ones(10).bool(),
        "attention_mask": d.ones(16).bool(),
        "timestep": d.uniform(),
    },
)
add(
    "MiniMaxMusic3Transformer1DModel",
    {"in_channels": 8, "condition_dim": 64, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}
    | {"ff_inner_dim": 128, "rotary_dim": 16, "fourier_embedding_dim": 64},
    lambda d: {
        "hidden_states": d.normal(8, 16),
        "encoder_hidden_states": d.normal(16, 64),
        "timestep": d.uniform(),
    },
)


def small_queries(model: nn.Module) -> None:
    """T5's attention does not divide by the root of its width: its queries are small from the start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("to_q.weight"):
                parameter.mul_(32**-0.5)


add(
    "T5FilmDecoder",
    {"input_dims": 64, "targets_length": 16, "d_model": 64, "num_layers": 2, "num_heads": 2, "d_kv": 32, "d_ff": 128},
    lambda d: {
        "encodings_and_masks": [(d.normal(8, 64), d.ones(8)), (d.normal(4, 64), d.ones(4))],
        "decoder_input_tokens": d.normal(16, 64),
        "decoder_noise_time": d.uniform(),
    },
    adjust=small_queries,
)

PRIOR = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "embedding_dim": 64}
PRIOR |= {"num_embeddings": 7, "additional_embeddings": 4}
add(
    "PriorTransformer",
    PRIOR,
    lambda d: {
        "hidden_states": d.normal(64),
        "timestep": int(d.steps()[0]),
        "proj_embedding": d.normal(64),
        "encoder_hidden_states": d.normal(7, 64),
        "attention_mask": d.ones(7),
    },
)
add(
    "PriorTransformer",
    PRIOR
    | {"num_embeddings": 8, "additional_embeddings": 0, "encoder_hid_proj_type": None, "added_emb_type": None}
    | {"time_embed_act_fn": "gelu", "norm_in_type": "layer", "embedding_proj_norm_type": "layer"},
    lambda d: {"hidden_states": d.normal(8, 64), "timestep": d.steps(), "proj_embedding": d.normal(64)},
    "of shapes",
)


def molecule(d: Draw) -> dict:
    yes = d.ones(6).bool()
    return {
        "bb_ca": d.normal(6, 3),
        "local_latents": d.normal(6, 8),
        "bb_ca_time": d.uniform(),
        "local_latents_time": d.uniform(),
        "padding_mask": yes,
        "token_type": d.integers(7, 6),
        "conditioning": {"is_in_context_conditioning": ~yes, "supports_local_latent": yes},
    }


TIMES = ("time_emb_bb_ca", "time_emb_local_latents")
add(
    "RFD4ProteinaTransformer",
    {"nlayers": 2, "token_dim": 64, "nheads": 2, "dim_cond": 64, "pair_repr_dim": 64, "latent_dim": 8}
    | {"t_emb_dim": 64, "tri_mult_c": 64, "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type")}
    | {"feats_cond_seq": TIMES, "feats_pair_repr": ("xt_bb_ca_pair_dists",), "feats_pair_cond": TIMES},
    molecule,
)
