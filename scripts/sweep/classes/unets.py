"""UNets: of sound, images, video and cascades."""

from __future__ import annotations

from .case import Draw, Table

UNETS = Table()
add = UNETS.add

CHANNELS = {"block_out_channels": (32, 64), "norm_num_groups": 8}
FOUR = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "sample_size": 16}


def image(d: Draw, channels: int = 4, **more) -> dict:
    """An image [channels, 16, 16], one time for all."""
    return {"sample": d.normal(channels, 16, 16), "timestep": d.steps()[0], **more}


def with_text(d: Draw, **more) -> dict:
    return image(d, encoder_hidden_states=d.normal(4, 64), **more)


ONE = {"in_channels": 14, "out_channels": 14, "block_out_channels": (32, 32, 64, 64), "freq_shift": 1.0}
ONE |= {"time_embedding_type": "positional", "use_timestep_embedding": True, "flip_sin_to_cos": False}
ONE |= {"down_block_types": ("DownResnetBlock1D",) * 4}
for variant, more in {
    "trajectories": {
        "out_block_type": "OutConv1DBlock",
        "mid_block_type": "MidResTemporalBlock1D",
        "up_block_types": ("UpResnetBlock1D",) * 3,
        "act_fn": "swish",
    },
    "values": {
        "out_block_type": "ValueFunction",
        "mid_block_type": "ValueFunctionMidBlock1D",
        "up_block_types": (),
        "act_fn": "mish",
        "downsample_each_block": True,
        "layers_per_block": 1,
    },
}.items():
    add("UNet1DModel", ONE | more, lambda d: {"sample": d.normal(14, 16), "timestep": d.steps()}, variant)
add(
    "UNet1DModel",
    {"in_channels": 2, "out_channels": 2, "extra_in_channels": 64, "block_out_channels": (32, 32, 64)}
    | {"time_embedding_type": "fourier", "flip_sin_to_cos": True, "sample_size": 64}
    | {"down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D")}
    | {"up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"), "mid_block_type": "UNetMidBlock1D"},
    lambda d: {"sample": d.normal(2, 64), "timestep": d.steps()},
    "sound",
)

ATTENTION = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
add("UNet2DModel", CHANNELS | FOUR | ATTENTION | {"attention_head_dim": 16}, image)
add(
    "UNet2DModel",
    CHANNELS | FOUR | ATTENTION | {"num_class_embeds": 8, "resnet_time_scale_shift": "scale_shift"},
    lambda d: image(d, class_labels=d.integers(8)),
    "classes",
)
add(
    "UNet2DModel",
    FOUR
    | {"block_out_channels": (32, 64), "norm_num_groups": None, "time_embedding_type": "fourier", "in_channels": 3}
    | {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "out_channels": 3, "norm_eps": 1e-6}
    | {"up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "mid_block_scale_factor": 1.414},
    lambda d: image(d, 3, timestep=d.steps()),
    "score",
)

CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
CROSS |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 64, "attention_head_dim": 4}
TEXT = CHANNELS | FOUR | CROSS
SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
SIZES |= {"projection_class_embeddings_input_dim": 64 + 6 * 8}
SIMPLE = {"down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D")}
SIMPLE |= {"up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"), "encoder_hid_dim": 64}
SIMPLE |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "addition_embed_type": "text"}
SIMPLE |= {
    "class_embed_type": "timestep",
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type_num_heads": 4,
}
NAME = "UNet2DConditionModel"


def sized(d: Draw, **more) -> dict:
    return with_text(d, added_cond_kwargs={"text_embeds": d.normal(64), "time_ids": d.full([64, 64, 0, 0, 64, 64])})


add(NAME, TEXT, with_text)
add(NAME, TEXT | SIZES, sized, "text and sizes")
add(NAME, TEXT | {"time_cond_proj_dim": 64}, lambda d: with_text(d, timestep_cond=d.normal(64)), "guidance")
add(NAME, TEXT | SIMPLE, lambda d: with_text(d, class_labels=d.steps()), "pixels, classes by time")
add(
    NAME,
    TEXT | {"encoder_hid_dim": 64, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
    lambda d: with_text(d, added_cond_kwargs={"image_embeds": d.normal(64)}),
    "image embeddings",
)
add(
    NAME,
    TEXT | {"attention_type": "gated"},
    lambda d: with_text(
        d,
        cross_attention_kwargs={
            "gligen": {"boxes": d.uniform(3, 4), "masks": d.ones(3), "positive_embeddings": d.normal(3, 64)}
        },
    ),
    "boxes",
)

THREE = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "cross_attention_dim": 64}
THREE |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 32}
VIDEO = CHANNELS | FOUR | THREE


def video(d: Draw, **more) -> dict:
    return with_text(d) | {"sample": d.normal(4, 2, 8, 8)} | more


add("UNet3DConditionModel", VIDEO, video)
add(
    "I2VGenXLUNet",
    VIDEO | {"num_attention_heads": 2},
    lambda d: video(d, fps=d.integers(16) + 1, image_latents=d.normal(4, 2, 8, 8), image_embeddings=d.normal(1, 64)),
)
MOTION = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "cross_attention_dim": 64}
MOTION |= {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2}
MOTION |= {"motion_num_attention_heads": 2}
add(
    "UNetMotionModel",
    CHANNELS | FOUR | MOTION,
    lambda d: video(d, encoder_hidden_states=d.normal(4, 64).repeat_interleave(2, 0)),
)
add(
    "UNetSpatioTemporalConditionModel",
    FOUR
    | {"block_out_channels": (32, 64), "cross_attention_dim": 64, "num_attention_heads": (1, 2)}
    | {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    | {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
    | {"projection_class_embeddings_input_dim": 96, "addition_time_embed_dim": 32, "in_channels": 8},
    lambda d: video(
        d,
        sample=d.normal(2, 8, 8, 8),
        encoder_hidden_states=d.normal(1, 64),
        added_time_ids=d.full([6.0, 127.0, 0.02]),
    ),
)
add(
    "Kandinsky3UNet",
    {"in_channels": 4, "time_embedding_dim": 64, "groups": 8, "attention_head_dim": 32, "layers_per_block": 2}
    | {"block_out_channels": (64, 128), "cross_attention_dim": 64, "encoder_hid_dim": 64},
    lambda d: with_text(d, encoder_attention_mask=d.ones(4)),
)

CASCADE = {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 64, "conditioning_dim": 64}
CASCADE |= {"block_out_channels": (64, 64), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1)}
CASCADE |= {"up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": 64}


def cascade(d: Draw, **more) -> dict:
    return {
        "sample": d.normal(4, 8, 8),
        "timestep_ratio": d.uniform(),
        "clip_text_pooled": d.normal(1, 64),
        **more,
    }


NAME = "StableCascadeUNet"
add(
    NAME,
    CASCADE | {"clip_text_in_channels": 64, "clip_image_in_channels": 64, "switch_level": (False,)},
    lambda d: cascade(d, clip_text=d.normal(4, 64), clip_img=d.normal(1, 64)),
    "prior",
)
add(
    NAME,
    CASCADE
    | {"effnet_in_channels": 16, "pixel_mapper_in_channels": 3, "patch_size": 2}
    | {"timestep_conditioning_type": ("sca",)},
    lambda d: cascade(d, effnet=d.normal(16, 4, 4), pixels=d.normal(3, 8, 8)),
    "decoder",
)
add(
    "DreamLiteUNetModel",
    FOUR
    | {"block_out_channels": (32, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 64, "attention_head_dim": 32}
    | {"addition_embed_type_num_heads": 4},
    with_text,
)
add(
    "AudioLDM2UNet2DConditionModel",
    TEXT | {"cross_attention_dim": ((None, 64, 64), (None, 64, 64)), "transformer_layers_per_block": 1},
    lambda d: with_text(d, encoder_hidden_states_1=d.normal(6, 64), encoder_attention_mask_1=d.ones(6)),
)
add(
    "UVit2DModel",
    {"hidden_size": 64, "cond_embed_dim": 64, "micro_cond_encode_dim": 16, "micro_cond_embed_dim": 80}
    | {"encoder_hidden_size": 64, "vocab_size": 32, "codebook_size": 24, "in_channels": 64, "block_out_channels": 64}
    | {"num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 128, "sample_size": 8, "downsample": True, "upsample": True},
    lambda d: {
        "input_ids": d.integers(24, 8, 8),
        "encoder_hidden_states": d.normal(4, 64),
        "pooled_text_emb": d.normal(64),
        "micro_conds": d.full([64, 64, 0, 0, 6]),
    },
)
