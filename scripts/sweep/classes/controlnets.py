"""ControlNets: networks that are called with a time beside a denoiser, and adapters that hold both."""

from __future__ import annotations

import torch
from torch import nn

from .case import Draw, Table
from .discover import denoisers
from .transformers_image import HUNYUAN, SANA, SD3, hunyuan_dit, words
from .transformers_packed import Z_IMAGE
from .transformers_tokens import FLUX, QWEN, WHERE, qwen, tokens
from .transformers_video import COSMOS
from .unets import CHANNELS, CROSS, MOTION, SIZES, sized, with_text

CONTROL = Table()
add = CONTROL.add

PICTURE = {"conditioning_embedding_out_channels": (16, 32), "in_channels": 4, "layers_per_block": 1}
DOWN = {k: v for k, v in CROSS.items() if k != "up_block_types"}


def picture(d: Draw) -> torch.Tensor:
    """What steers a UNet of 16 x 16: a picture of twice the size."""
    return d.normal(3, 32, 32)


NAME = "ControlNetModel"
add(NAME, CHANNELS | PICTURE | DOWN, lambda d: with_text(d, controlnet_cond=picture(d)))
add(NAME, CHANNELS | PICTURE | DOWN | SIZES, lambda d: sized(d) | {"controlnet_cond": picture(d)}, "text and sizes")
add(
    "ControlNetUnionModel",
    CHANNELS
    | PICTURE
    | DOWN
    | {"num_control_type": 2, "num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 32}
    | SIZES
    | {"projection_class_embeddings_input_dim": 64 + 6 * 8, "addition_time_embed_dim": 8},
    lambda d: (
        sized(d)
        | {"controlnet_cond": [picture(d)], "control_type": d.full([1, 0]), "control_type_idx": [0]}
        | {"conditioning_scale": [1.0]}
    ),
)
add(
    "SparseControlNetModel",
    CHANNELS
    | {k: v for k, v in MOTION.items() if k != "up_block_types"}
    | {"in_channels": 4, "conditioning_channels": 4, "layers_per_block": 1},
    lambda d: (
        with_text(d)
        | {"sample": d.normal(4, 2, 8, 8), "encoder_hidden_states": d.normal(4, 64).repeat_interleave(2, 0)}
        | {"controlnet_cond": d.normal(4, 2, 8, 8), "conditioning_mask": d.ones(1, 2, 8, 8)}
    ),
)
add(
    "UNetControlNetXSModel",
    {"sample_size": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "block_out_channels": (32, 64)}
    | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 64, "num_attention_heads": 2}
    | {"norm_num_groups": 8, "ctrl_block_out_channels": [16, 32], "ctrl_num_attention_heads": 2}
    | {"ctrl_max_norm_num_groups": 8, "ctrl_conditioning_embedding_out_channels": (16, 16)},
    lambda d: with_text(d, controlnet_cond=picture(d), conditioning_scale=1.0),
)
NAME = "FluxControlNetModel"


def flux(d: Draw, **more) -> dict:
    return tokens(d, pooled_projections=d.normal(64), controlnet_cond=d.normal(16, 4), **WHERE) | more


add(NAME, FLUX, flux)
add(
    NAME,
    FLUX | {"guidance_embeds": True, "num_mode": 2},
    lambda d: flux(d, guidance=d.uniform(), controlnet_mode=d.integers(2, 1)),
    "modes, guidance",
)
add("SD3ControlNetModel", SD3, lambda d: sd3(d))
add(
    "SD3ControlNetModel",
    SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm", "extra_conditioning_channels": 1},
    lambda d: sd3(d, controlnet_cond=d.normal(5, 8, 8)),
    "3.5, inpainting",
)


def sd3(d: Draw, **more) -> dict:
    latents = {"hidden_states": d.normal(4, 8, 8), "controlnet_cond": d.normal(4, 8, 8)}
    return words(d, pooled_projections=d.normal(64)) | latents | more


add(
    "SanaControlNetModel",
    SANA,
    lambda d: words(d, hidden_states=d.normal(4, 8, 8), controlnet_cond=d.normal(4, 8, 8)),
)
add(
    "HunyuanDiT2DControlNetModel",
    {k: v for k, v in HUNYUAN.items() if k != "num_layers"} | {"transformer_num_layers": 4},
    lambda d: hunyuan_dit(d) | {"controlnet_cond": d.normal(4, 8, 8)},
)
add(
    "QwenImageControlNetModel",
    QWEN | {"patch_size": 2},
    lambda d: qwen(d, controlnet_cond=d.normal(16, 16)),
)
add(
    "CosmosControlNetModel",
    {k: v for k, v in COSMOS.items() if k not in ("out_channels", "num_layers", "concat_padding_mask")}
    | {"n_controlnet_blocks": 2, "in_channels": 5, "latent_channels": 5, "model_channels": 64}
    | {"extra_pos_embed_type": None, "img_context_dim_in": 64, "img_context_dim_out": 64}
    | {"use_crossattn_projection": False},
    lambda d: {
        "controls_latents": d.normal(4, 1, 8, 8),
        "latents": d.normal(4, 1, 8, 8),
        "timestep": d.uniform(),
        "encoder_hidden_states": (d.normal(8, 64), d.normal(4, 64)),
        "condition_mask": d.ones(1, 1, 8, 8),
        "conditioning_scale": 1.0,
        "padding_mask": torch.zeros(1, 1, 8, 8),
    },
)


def beside_z_image(**config) -> nn.Module:
    """The ControlNet with what it borrows from its transformer."""
    control = denoisers()["ZImageControlNetModel"](**config)
    return control.from_transformer(control, denoisers()["ZImageTransformer2DModel"](**Z_IMAGE))


add(
    "ZImageControlNetModel",
    {"control_layers_places": [0, 1], "control_refiner_layers_places": [0], "control_in_dim": 4, "dim": 64}
    | {"add_control_noise_refiner": "control_noise_refiner", "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
    lambda d: {
        "x": [d.alone(4, 1, 8, 8) for _ in range(d.batch)],
        "t": d.uniform(),
        "cap_feats": [d.alone(8, 64) for _ in range(d.batch)],
        "control_context": [d.alone(4, 1, 8, 8) for _ in range(d.batch)],
    },
    make=beside_z_image,
)
