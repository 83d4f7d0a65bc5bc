"""Parts of fused blocks (blocks.py): which modules fit together, and what lies between them."""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from ...handed.value import same_key
from ...hooks import unhooked
from ..base import QuantizedLayer


def feed_forward(
    x: Tensor, norm: nn.LayerNorm, ff: FeedForward, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:  # fmt: skip
    """x + gate * ff(norm(x) * (1 + scale) + shift)."""
    return x + gate[:, None] * ff(first(ff).input_codes(x, norm=(scale, shift, norm.eps)))


def modulation(norm: nn.Module, embedding: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shift, scale and gate [B, K] that an adaptive norm makes of an embedding [B, K]; twice where it has six."""
    return norm.linear(norm.silu(embedding)).chunk(parts, dim=1)


def in_range(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x  # as FLUX's blocks have it


def projections(attn: nn.Module) -> list[nn.Module]:
    return [attn.to_qkv] if attn.fused_projections else [attn.to_q, attn.to_k, attn.to_v]


def added_projections(attn: nn.Module) -> list[nn.Module]:
    return [attn.to_added_qkv] if attn.fused_projections else [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]


def first(ff: FeedForward) -> nn.Module:
    return ff.net[0].proj


def before(ff: FeedForward) -> list[nn.Module]:
    """Modules that pass an input on to the first layer."""
    return [ff, ff.net[0]]


# ------------------------------------------------------------------------------------------------ what fits


def unweighted(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine


def modulates(norm: nn.Module) -> bool:
    return type(norm) in (AdaLayerNormZero, AdaLayerNormZeroSingle) and unweighted(norm.norm)


def widens(ff: nn.Module) -> bool:
    return type(ff) is FeedForward and isinstance(ff.net[0], GELU) and read_codes(first(ff))


def in_blocks(layer: nn.Module) -> bool:
    """True of a layer whose own class says so: adapters around one and classes derived from it compute otherwise."""
    return vars(type(layer)).get("in_blocks", False)


def read_codes(*layers: nn.Module) -> bool:
    return all(in_blocks(layer) and not layer.why_not_in_blocks() for layer in layers)


def share(layers: list[nn.Module]) -> bool:
    """True if codes for the first of the layers are codes for all: of W8A8 layers if the grid is one, of SVDQuant's
    if smoothing and branch are, without adapters."""
    first, *others = [layer.codes_key() for layer in layers]
    for key in others:
        if not same_key(key, first):
            return False
    return first is not None or not others


def runs_fused(layers: list[nn.Module], passed_over: list[nn.Module]) -> bool:
    """True if kernels serve the layers, and nothing waits for calls of modules that get codes, or no call at all."""
    for layer in layers:
        if not in_blocks(layer) or not on_kernels(layer):
            return False
    return unhooked(*layers, *passed_over)


def codes_on_cpu(module: nn.Module) -> bool:
    """True if kernels of this CPU serve all layers of a fused module."""
    layers = [layer for layer in module.modules() if in_blocks(layer)]
    return all(layer.qweight.device.type == "cpu" and on_kernels(layer) for layer in layers)


def on_kernels(layer: QuantizedLayer) -> bool:
    """True if kernels serve a layer where it is."""
    return layer.has_block_kernels()
