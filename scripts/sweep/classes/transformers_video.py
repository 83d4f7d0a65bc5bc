"""Transformers of video, from A to L."""

from __future__ import annotations

import torch

from .case import Draw, Table, grid

VIDEO = Table()
add = VIDEO.add

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}  # 64 wide
FOUR = {"in_channels": 4, "out_channels": 4}


def clip(d: Draw, **more) -> dict:
    """2 frames of 8 x 8 with 4 channels [4, 2, 8, 8], 8 words, a step."""
    latents, text = d.normal(4, 2, 8, 8), d.normal(8, 64)
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": d.steps(), **more}


def steered(d: Draw, **more) -> dict:
    """With an image of 5 tokens, which models of Wan's kind tell from 512 words by its place."""
    return (
        clip(d) | {"encoder_hidden_states": d.normal(512, 64), "encoder_hidden_states_image": d.normal(5, 64)} | more
    )


def frames_first(d: Draw, **more) -> dict:
    """The same with frames before channels [2, 4, 8, 8]."""
    return clip(d) | {"hidden_states": d.normal(2, 4, 8, 8)} | more


add(
    "AllegroTransformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 96, "num_layers": 2, "cross_attention_dim": 192}
    | FOUR
    | {"sample_width": 8, "sample_height": 8, "sample_frames": 2, "caption_channels": 64},
    lambda d: clip(
        d,
        attention_mask=d.ones(2, 8, 8),
        encoder_attention_mask=d.ones(8),
        image_rotary_emb=allegro_places(),
    ),
)


def allegro_places() -> tuple:
    """((cos, sin) of frames, rows, columns, each [1, tokens, 32]), (their places, [1, tokens])."""
    places = grid(2, 4, 4).T.long()
    angles = torch.arange(8)[:, None] * torch.logspace(0, -2, 16)[None]
    table = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    return tuple((table[0], table[1]) for _ in range(3)), tuple(places[i][None] for i in range(3))


WAN = HEADS | FOUR | {"patch_size": (1, 2, 2), "text_dim": 64, "freq_dim": 64, "ffn_dim": 128, "num_layers": 2}
WAN |= {"cross_attn_norm": True, "rope_max_seq_len": 32}
FLOW = WAN | {"gate_value": 0.25, "deltatime_type": "r"}


def flow_map(d: Draw, frames: int, **more) -> dict:
    steps = d.steps(frames).float()
    latents = d.normal(frames, 4, 8, 8)
    return clip(d) | {"hidden_states": latents, "timestep": steps, "r_timestep": steps / 2} | more


add("AnyFlowTransformer3DModel", FLOW, lambda d: flow_map(d, 2))
add(
    "AnyFlowFARTransformer3DModel",
    FLOW | {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
    lambda d: flow_map(d, 4, chunk_partition=[2, 2]),
)
add("ChronoEditTransformer3DModel", WAN | {"rope_temporal_skip_len": 8}, clip)
IMAGE = WAN | {"image_dim": 64, "added_kv_proj_dim": 64}
add("ChronoEditTransformer3DModel", IMAGE, steered, "image")

COG = HEADS | FOUR | {"time_embed_dim": 64, "text_embed_dim": 64, "num_layers": 2, "sample_width": 8}
COG |= {"sample_height": 8, "sample_frames": 5, "patch_size": 2, "temporal_compression_ratio": 4}
COG |= {"max_text_seq_length": 8}
add("CogVideoXTransformer3DModel", COG, frames_first)
ROTARY = (torch.linspace(0, 6, 32 * 32).view(32, 32).cos(), torch.linspace(0, 6, 32 * 32).view(32, 32).sin())
add(
    "CogVideoXTransformer3DModel",
    COG | {"use_rotary_positional_embeddings": True},
    lambda d: frames_first(d, image_rotary_emb=ROTARY),
    "rotary",
)
add(
    "CogVideoXTransformer3DModel",
    COG | {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "ofs_embed_dim": 64},
    lambda d: frames_first(d, image_rotary_emb=(ROTARY[0][:16], ROTARY[1][:16]), ofs=d.full([2.0])[:, 0]),
    "1.5",
)
add(
    "ConsisIDTransformer3DModel",
    COG
    | {
        "num_attention_heads": 6,
        "cross_attn_interval": 1,
        "is_train_face": True,
        "cross_attn_dim_head": 32,
        "cross_attn_num_heads": 2,
    }
    | {"LFE_id_dim": 64, "LFE_vit_dim": 64, "LFE_depth": 5, "LFE_dim_head": 32, "LFE_num_heads": 2}
    | {"LFE_num_id_token": 2, "LFE_num_querie": 2, "LFE_output_dim": 128, "LFE_ff_mult": 1, "LFE_num_scale": 5},
    lambda d: frames_first(d, id_cond=d.normal(64), id_vit_hidden=[d.normal(3, 64) for _ in range(5)]),
)

COSMOS = HEADS | FOUR | {"num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 64, "adaln_lora_dim": 64}
COSMOS |= {
    "max_size": (4, 8, 8),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,
}


def padded(d: Draw, **more) -> dict:
    return clip(d, attention_mask=d.ones(8), fps=30, **more)


add("CosmosTransformer3DModel", COSMOS | {"extra_pos_embed_type": "learnable"}, padded)
add(
    "CosmosTransformer3DModel",
    COSMOS | {"in_channels": 5},
    lambda d: padded(d, condition_mask=d.ones(1, 2, 8, 8)),
    "video to world",
)
add(
    "CosmosTransformer3DModel",
    COSMOS
    | {"use_crossattn_projection": True, "crossattn_proj_in_channels": 64, "encoder_hidden_states_channels": 64},
    padded,
    "text projection",
)


def cosmos3(d: Draw) -> dict:
    """2 words, then 16 vision tokens. One sample: its layout says where what lies."""
    vision = torch.arange(2, 18)
    places = torch.cat([torch.arange(2)[None].expand(3, 2), 2 + grid(1, 4, 4).T.long()], 1)
    return {
        "input_ids": torch.tensor([1, 2]),
        "text_indexes": torch.tensor([0, 1]),
        "position_ids": places,
        "und_len": 2,
        "sequence_length": 18,
        "vision_tokens": [d.alone(1, 4, 1, 4, 4)],
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": d.steps()[:1].float().expand(16),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


add(
    "Cosmos3OmniTransformer",
    {"head_dim": 32, "hidden_act": "relu2", "hidden_size": 64, "intermediate_size": 128, "latent_channel": 4}
    | {"latent_patch_size": 1, "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1}
    | {"patch_latent_dim": 4, "qk_norm_for_text": True, "rope_axes_dim": [8, 4, 4], "vocab_size": 32},
    cosmos3,
)
ANIMATE = HEADS | FOUR | {"mmdit_layers": 2, "num_layers": 2, "patch_size": 2, "sample_height": 8, "sample_width": 8}
ANIMATE |= {"text_embed_dim": 64, "time_embed_dim": 64, "time_position_encoding_type": "3d_rope"}
add("EasyAnimateTransformer3DModel", ANIMATE, clip)
add(
    "EasyAnimateTransformer3DModel",
    ANIMATE | {"in_channels": 8, "text_embed_dim_t5": 64},
    lambda d: clip(d, encoder_hidden_states_t5=d.normal(4, 64), inpaint_latents=d.normal(4, 2, 8, 8)),
    "two texts, inpainting",
)


def history(d: Draw) -> dict:
    places = lambda n: torch.arange(n).float().expand(d.batch, -1)  # noqa: E731
    return clip(
        d,
        indices_hidden_states=places(2),
        indices_latents_history_short=places(1),
        indices_latents_history_mid=places(2),
        indices_latents_history_long=places(4),
        latents_history_short=d.normal(4, 1, 8, 8),
        latents_history_mid=d.normal(4, 2, 8, 8),
        latents_history_long=d.normal(4, 4, 8, 8),
    )


HELIOS = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (8, 12, 12)}
HELIOS |= {"has_multi_term_memory_patch": True, "guidance_cross_attn": True, "zero_history_timestep": True}
add("HeliosTransformer3DModel", HELIOS, history)

LATTE = HEADS | {"sample_size": 8, "num_layers": 2, "patch_size": 2, "caption_channels": 64, "in_channels": 4}
add(
    "LatteTransformer3DModel",
    LATTE
    | {"cross_attention_dim": 64, "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate"}
    | {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False}
    | {"norm_eps": 1e-6, "video_length": 2},
    lambda d: clip(d, enable_temporal_attentions=True),
)

LTX = HEADS | FOUR | {"cross_attention_dim": 64, "num_layers": 2, "caption_channels": 64}
SHAPE = {"num_frames": 2, "height": 4, "width": 4}


def packed(d: Draw, **more) -> dict:
    """32 tokens of 4 channels."""
    return clip(d) | {"hidden_states": d.normal(32, 4), "encoder_attention_mask": d.ones(8).bool()} | SHAPE | more


add("LTXVideoTransformer3DModel", LTX, packed)
add("LTXVideoTransformer3DModel", LTX, lambda d: packed(d, timestep=d.steps(32)), "a time for each token")
LTX2 = LTX | {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2}
LTX2 |= {"audio_attention_head_dim": 32, "audio_cross_attention_dim": 64, "rope_double_precision": False}
add(
    "LTX2VideoTransformer3DModel",
    LTX2,
    lambda d: packed(
        d,
        audio_hidden_states=d.normal(9, 4),
        audio_encoder_hidden_states=d.normal(8, 64),
        audio_num_frames=9,
        fps=25.0,
        timestep=d.steps().float(),
    ),
)
