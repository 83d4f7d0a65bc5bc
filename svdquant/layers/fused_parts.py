"""Parts of fused blocks: which modules fit together, and what lies between them."""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from ...hooks import unhooked
from ...kernels.w4 import layer as svdq_linear
from .svdq import SVDQLinear


def feed_forward(x: Tensor, norm: nn.LayerNorm, ff: FeedForward, shift, scale, gate) -> Tensor:
    """x + gate * ff(norm(x) * (1 + scale) + shift)."""
    return x + gate[:, None] * ff(first(ff).codes(x, norm=(scale, shift, norm.eps)))


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


def read_codes(*layers: nn.Module) -> bool:
    return all(type(layer) is SVDQLinear and not layer.why_not_fused() for layer in layers)


def share(layers: list[nn.Module]) -> bool:
    """True if codes for the first of the layers are codes for all: smoothing and branch are one, without adapters."""
    if len(layers) == 1:
        return True
    leader = layers[0]._lender[0] if layers[0]._lender else layers[0]
    for layer in layers:
        if (layer._lender[0] if layer._lender else layer) is not leader or layer.lora_down is not None:
            return False
    return True


def runs_fused(layers: list[nn.Module], passed_over: list[nn.Module]) -> bool:
    """True if kernels serve the layers, and nothing waits for calls of modules that get codes, or no call at all."""
    for layer in layers:
        if type(layer) is not SVDQLinear:
            return False
    return _on_kernels(layers[0]) and unhooked(*layers, *passed_over)


def codes_on_cpu(module: nn.Module) -> bool:
    """True if kernels of this CPU serve all SVDQuant layers of a fused module."""
    layers = [layer for layer in module.modules() if type(layer) is SVDQLinear]
    return all(layer.qweight.device.type == "cpu" and _on_kernels(layer) for layer in layers)


def _on_kernels(layer: SVDQLinear) -> bool:
    return layer.kernel_name() != svdq_linear.REFERENCE
