"""Transformers of video, from H to S."""

from __future__ import annotations

import torch

from .case import Draw, Table, grid
from .transformers_video import FOUR, HEADS, clip

MORE_VIDEO = Table()
add = MORE_VIDEO.add

HUNYUAN = HEADS | FOUR | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1}
HUNYUAN |= {"patch_size_t": 1, "text_embed_dim": 64, "pooled_projection_dim": 64, "rope_axes_dim": (8, 12, 12)}


def hunyuan(d: Draw, channels: int = 4, **more) -> dict:
    """One frame of 4 x 4."""
    return (
        clip(d)
        | {"hidden_states": d.normal(channels, 1, 4, 4), "timestep": d.steps().float()}
        | {"pooled_projections": d.normal(64), "encoder_attention_mask": d.ones(8)}
        | more
    )


GUIDED = {"guidance_embeds": True}
NAME = "HunyuanVideoTransformer3DModel"
add(NAME, HUNYUAN | GUIDED, lambda d: hunyuan(d, guidance=d.steps().float()))
add(
    NAME,
    HUNYUAN | {"guidance_embeds": False, "in_channels": 9, "image_condition_type": "latent_concat"},
    lambda d: hunyuan(d, 9),
    "image: more channels",
)
add(
    NAME,
    HUNYUAN | GUIDED | {"image_condition_type": "token_replace"},
    lambda d: hunyuan(d, guidance=d.steps().float()),
    "image: its tokens",
)


def framepack(d: Draw) -> dict:
    return hunyuan(
        d,
        hidden_states=d.normal(4, 3, 4, 4),
        guidance=d.steps().float(),
        image_embeds=d.normal(5, 64),
        indices_latents=torch.arange(3).float(),
        latents_clean=d.normal(4, 2, 4, 4),
        indices_latents_clean=torch.arange(2).float(),
        latents_history_2x=d.normal(4, 2, 4, 4),
        indices_latents_history_2x=torch.arange(2).float(),
        latents_history_4x=d.normal(4, 8, 4, 4),
        indices_latents_history_4x=torch.arange(8).float(),
    )


add(
    "HunyuanVideoFramepackTransformer3DModel",
    HUNYUAN
    | GUIDED
    | {"patch_size": 2, "has_image_proj": True, "image_proj_dim": 64, "has_clean_x_embedder": True}
    | {"image_condition_type": None},
    framepack,
)

FIFTEEN = HEADS | FOUR | {"num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 1}
FIFTEEN |= {"patch_size_t": 1, "text_embed_dim": 64, "text_embed_2_dim": 64, "image_embed_dim": 64}
FIFTEEN |= {"rope_axes_dim": (8, 12, 12), "target_size": 16}


def fifteen(d: Draw, images: torch.Tensor) -> dict:
    latents = {"hidden_states": d.normal(4, 1, 4, 4), "timestep": d.steps().float(), "image_embeds": images}
    texts = {"encoder_hidden_states_2": d.normal(4, 64), "encoder_attention_mask_2": d.ones(4)}
    return clip(d) | latents | texts | {"encoder_attention_mask": d.ones(8)}


NAME = "HunyuanVideo15Transformer3DModel"
add(NAME, FIFTEEN | {"task_type": "t2v"}, lambda d: fifteen(d, torch.zeros(d.batch, 3, 64)))
add(NAME, FIFTEEN | {"task_type": "i2v"}, lambda d: fifteen(d, d.normal(3, 64)), "image")

KANDINSKY = {"in_text_dim": 64, "in_text_dim2": 64, "time_dim": 64, "patch_size": (1, 2, 2), "model_dim": 64}
KANDINSKY |= {"ff_dim": 128, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12)}
KANDINSKY |= {"in_visual_dim": 4, "out_visual_dim": 4}


def channels_last(d: Draw, channels: int = 4, **more) -> dict:
    return clip(d) | {"hidden_states": d.normal(2, 8, 8, channels), "pooled_projections": d.normal(64)} | more


WHERE = {"visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)], "text_rope_pos": torch.arange(8)}
NAME = "Kandinsky5Transformer3DModel"
add(NAME, KANDINSKY, lambda d: channels_last(d, **WHERE))
add(NAME, KANDINSKY | {"visual_cond": True}, lambda d: channels_last(d, 9, **WHERE), "image")
NAME = "Kandinsky6Transformer3DModel"
add(NAME, KANDINSKY | {"in_audio_dim": 4, "out_audio_dim": 4}, lambda d: channels_last(d, 9), "video alone")
add(
    NAME,
    KANDINSKY | {"in_audio_dim": 4, "out_audio_dim": 4, "visual_cond": False, "ca_rope": True, "cross_gates": True},
    lambda d: channels_last(d, audio_hidden_states=d.normal(6, 4)),
    "with audio",
)
add(
    "Kandinsky6SRTransformer3DModel",
    {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 64, "model_dim": 64, "ff_dim": 128}
    | {"num_visual_blocks": 2, "axes_dims": (8, 12, 12)},
    lambda d: {"hidden_states": d.normal(1, 16, 16, 9), "timestep": d.steps()},
)


def minimax(d: Draw) -> dict:
    """4 words, 6 tokens of sound and 8 of video in one sequence, with two times."""
    video, sound, text = range(10, 18), range(4, 10), range(4)
    tags = torch.tensor([1] * 4 + [2] * 6 + [0] * 8)
    places = torch.zeros(18, 3)
    places[:, 0] = torch.arange(18)
    places[10:, 1:] = grid(4, 2)
    return {
        "hidden_states": d.normal(8, 16),
        "audio_hidden_states": d.normal(6, 6),
        "encoder_hidden_states": d.normal(4, 64),
        "timestep": torch.rand(2, generator=d.generator),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": torch.tensor(video),
        "audio_indices": torch.tensor(sound),
        "text_indices": torch.tensor(text),
    }


add(
    "MiniMaxH3Transformer3DModel",
    HEADS
    | {"hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 128, "in_channels": 4}
    | {"audio_in_channels": 6, "patch_size": (1, 2, 2), "text_dim": 64, "freq_dim": 64, "time_embed_hidden_dim": 64}
    | {"time_embed_dim": 64, "rope_freq_dim": 4},
    minimax,
)
add(
    "MochiTransformer3DModel",
    HEADS
    | {"patch_size": 2, "num_layers": 2, "pooled_projection_dim": 64, "in_channels": 4, "text_embed_dim": 64}
    | {"time_embed_dim": 64, "max_sequence_length": 8},
    lambda d: clip(d, encoder_attention_mask=d.ones(8).bool()),
)
MOTIF = HEADS | {"in_channels": 9, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "patch_size": 1}
MOTIF |= {"num_decoder_layers": 1, "text_embed_dim": 64, "image_embed_dim": 64, "rope_axes_dim": (8, 12, 12)}
NAME = "MotifVideoTransformer3DModel"
add(NAME, MOTIF, lambda d: clip(d, hidden_states=d.normal(9, 2, 4, 4)))
add(
    NAME,
    MOTIF | {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True},
    lambda d: clip(d, hidden_states=d.normal(9, 2, 4, 4), image_embeds=d.normal(5, 64)),
    "image, text in each block",
)
add(
    "SanaVideoTransformer3DModel",
    HEADS
    | FOUR
    | {"num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    | {"caption_channels": 64, "sample_size": 8, "patch_size": (1, 2, 2), "qk_norm": "rms_norm_across_heads"}
    | {"rope_max_seq_len": 32},
    clip,
)
add(
    "SanaWMTransformer3DModel",
    {"in_channels": 4, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "softmax_every_n": 2}
    | {"linear_head_dim": 32, "chunk_plucker_channels": 6, "chunk_plucker_post_attn_blocks": 2}
    | {"caption_channels": 64, "image_size": 64, "mixed_precision": "no"},
    lambda d: clip(
        d,
        encoder_hidden_states=d.normal(1, 8, 64),
        timestep=d.steps(1, 2),
        encoder_attention_mask=d.ones(8),
        camera_conditions=torch.cat([torch.eye(4).flatten().expand(d.batch, 2, 16), 8 * d.ones(2, 4)], 2),
        chunk_plucker=d.normal(6, 2, 8, 8),
    ),
)


def refiner(d: Draw) -> dict:
    """32 tokens, with the rotary embedding of 2 frames of 4 x 4."""
    angles = torch.arange(32)[:, None] * torch.logspace(0, -2, 32)[None]
    rotary = (angles.cos().repeat_interleave(2, 1)[None], angles.sin().repeat_interleave(2, 1)[None])
    times = d.steps()[:, None].float().expand(-1, 32)
    return clip(d) | {"hidden_states": d.normal(32, 4), "timestep": times, "video_rotary_emb": rotary}


add(
    "SanaWMLTX2RefinerTransformer3DModel",
    HEADS
    | FOUR
    | {"cross_attention_dim": 64, "num_layers": 2, "caption_channels": 64, "audio_in_channels": 4}
    | {"audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 32}
    | {"audio_cross_attention_dim": 64, "rope_double_precision": False},
    refiner,
)
