"""Transformers of the sizes that are published, of one or two blocks, and what they are called with at 1024 pixels.

Sizes are those of the configurations on the hub: SDXL, PixArt, SD3.5 large, Qwen-Image, FLUX.2, Z-Image, LTX-Video,
Wan 2.1 of 14 B. `heads` and `tokens` make them smaller, for a look on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """heads: of attention, None for those of the model; side: rows of image tokens; frames: of a video."""

    heads: int | None = None
    side: int | None = None
    frames: int | None = None


def normal(*size: int) -> Tensor:
    return torch.randn(*size)


def sdxl(size: Size) -> tuple[nn.Module, dict]:
    """Its transformer of 1280 channels, batch 2 (guidance), 32 x 32 places."""
    heads, side = size.heads or 20, size.side or 32
    width = heads * 64
    model = diffusers.Transformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, in_channels=width, num_layers=1, cross_attention_dim=2048,
        use_linear_projection=True, norm_num_groups=32,
    )  # fmt: skip
    return model, dict(hidden_states=normal(2, width, side, side), encoder_hidden_states=normal(2, 77, 2048))


def pixart(size: Size) -> tuple[nn.Module, dict]:
    heads, side = size.heads or 16, size.side or 64
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=72, num_layers=1, sample_size=2 * side, in_channels=4,
        cross_attention_dim=heads * 72, caption_channels=4096, use_additional_conditions=False,
    )  # fmt: skip
    text = normal(2, 300, 4096)
    return model, dict(
        hidden_states=normal(2, 4, 2 * side, 2 * side), encoder_hidden_states=text, timestep=torch.tensor([500, 500])
    )


def sd3(size: Size) -> tuple[nn.Module, dict]:
    heads, side = size.heads or 38, size.side or 64
    model = diffusers.SD3Transformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, num_layers=2, sample_size=2 * side, in_channels=16,
        out_channels=16, patch_size=2, caption_projection_dim=heads * 64, joint_attention_dim=4096,
        pooled_projection_dim=2048, pos_embed_max_size=192, qk_norm="rms_norm",
    )  # fmt: skip
    return model, dict(
        hidden_states=normal(1, 16, 2 * side, 2 * side), encoder_hidden_states=normal(1, 333, 4096),
        pooled_projections=normal(1, 2048), timestep=torch.tensor([500]),
    )  # fmt: skip


def qwen(size: Size) -> tuple[nn.Module, dict]:
    heads, side = size.heads or 24, size.side or 64
    model = diffusers.QwenImageTransformer2DModel(num_attention_heads=heads, num_layers=1, joint_attention_dim=3584)
    return model, dict(
        hidden_states=normal(1, side * side, 64), encoder_hidden_states=normal(1, 128, 3584),
        encoder_hidden_states_mask=torch.ones(1, 128, dtype=torch.bool), timestep=torch.tensor([0.5]),
        img_shapes=[[(1, side, side)]],
    )  # fmt: skip


def places(count: int, side: int) -> Tensor:
    place = torch.arange(count)
    return torch.stack([0 * place, place // side, place % side, 0 * place], 1).float()


def flux2(size: Size) -> tuple[nn.Module, dict]:
    heads, side = size.heads or 48, size.side or 64
    model = diffusers.Flux2Transformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=heads, joint_attention_dim=15360
    )
    return model, dict(
        hidden_states=normal(1, side * side, 128), encoder_hidden_states=normal(1, 512, 15360),
        timestep=torch.tensor([0.5]), guidance=torch.tensor([3.5]), img_ids=places(side * side, side)[None],
        txt_ids=places(512, 512)[None],
    )  # fmt: skip


def z_image(size: Size) -> tuple[nn.Module, dict]:
    heads, side = size.heads or 30, size.side or 64
    model = diffusers.ZImageTransformer2DModel(
        dim=heads * 128, n_layers=1, n_refiner_layers=1, n_heads=heads, n_kv_heads=heads
    )
    return model, dict(x=[normal(16, 1, 2 * side, 2 * side)], cap_feats=[normal(128, 2560)], t=torch.tensor([0.5]))


def ltx(size: Size) -> tuple[nn.Module, dict]:
    """121 frames of 512 x 704."""
    heads, rows, frames = size.heads or 32, size.side or 16, size.frames or 16
    columns = rows * 11 // 8
    model = diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=64, num_layers=1, cross_attention_dim=heads * 64
    )
    return model, dict(
        hidden_states=normal(1, frames * rows * columns, 128), encoder_hidden_states=normal(1, 128, 4096),
        timestep=torch.tensor([500.0]), encoder_attention_mask=torch.ones(1, 128), num_frames=frames, height=rows,
        width=columns,
    )  # fmt: skip


def wan(size: Size) -> tuple[nn.Module, dict]:
    """81 frames of 480 x 832: 32760 tokens."""
    heads, rows, frames = size.heads or 40, size.side or 30, size.frames or 21
    columns = rows * 26 // 15
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, num_layers=1, ffn_dim=heads * 128 * 27 // 10 // 64 * 64, cross_attn_norm=True
    )
    return model, dict(
        hidden_states=normal(1, 16, frames, 2 * rows, 2 * columns), encoder_hidden_states=normal(1, 512, 4096),
        timestep=torch.tensor([500]),
    )  # fmt: skip


MODELS: dict[str, Callable[[Size], tuple[nn.Module, dict]]] = {
    "sdxl": sdxl, "wan": wan, "qwen-image": qwen, "z-image": z_image, "flux2": flux2, "pixart": pixart, "sd3": sd3,
    "ltx": ltx,
}  # fmt: skip
BLOCKS = ("transformer_blocks", "blocks", "layers", "single_transformer_blocks")  # where models keep them


def first_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The first block of each list of the model."""
    lists = {name: getattr(model, name) for name in BLOCKS if isinstance(getattr(model, name, None), nn.ModuleList)}
    return {name: one[0] for name, one in lists.items() if len(one)}
