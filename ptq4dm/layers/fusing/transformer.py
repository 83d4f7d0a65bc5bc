"""Fused transformer blocks on a CPU: a BasicTransformerBlock under adaLN-Zero, as DiT has (cpu.py).

    norm + modulation + codes, once for query, key and value | products | attention | codes | product
    | gated sum + norm + modulation + codes | product + GELU, as codes | product | gated sum

On a GPU the same is done by torch.compile, which sees the formula of codes (kernels/w8a8/from_codes.py).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from ...hooks import unhooked
from ...kernels.cpu.codes import cpu_gated_sum, cpu_layer_norm
from ..w8a8 import Int8Linear
from .cpu import attention_of_codes, grid_of, product, runs_fused


class FusedInt8TransformerBlock(BasicTransformerBlock):
    serves = (Int8Linear,)
    between = torch.float32

    @staticmethod
    def fits(block: BasicTransformerBlock) -> bool:
        attn, ff = block.attn1, block.ff.net
        modulated = block.norm_type == "ada_norm_zero" and type(block.norm1) is AdaLayerNormZero
        bare = block.attn2 is None and block.pos_embed is None and not block.only_cross_attention
        norms = modulated and type(block.norm1.norm) is nn.LayerNorm and type(block.norm3) is nn.LayerNorm
        plain = type(attn.processor) is AttnProcessor2_0 and attn.rescale_output_factor == 1.0
        parts = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
        plain = plain and not attn.residual_connection and all(getattr(attn, part, None) is None for part in parts)
        if not (bare and norms and plain and type(ff[0]) is GELU):
            return False
        if not all(type(layer) is Int8Linear and layer.plan.static for layer in _layers(block)):
            return False
        grids = [grid_of(layer) for layer in _layers(block)]
        return grids[0] == grids[1] == grids[2] and grids[-1][-1] == 8

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        given = attention_mask is not None or encoder_hidden_states is not None or cross_attention_kwargs
        if given or self.training or self._chunk_size is not None or not self._served(hidden_states):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        norm, (first, _, last) = self.norm1, self.ff.net
        emb = timestep if norm.emb is None else norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        emb = norm.linear(norm.silu(emb)).float()
        shift1, scale1, gate1, shift2, scale2, gate2 = emb.chunk(6, dim=1)
        codes = torch.uint8
        modulation = (*_modulation(norm.norm, scale1, shift1), norm.norm.eps)
        _, x = cpu_layer_norm(hidden_states, None, None, *modulation, codes, *grid_of(self.attn1.to_q))
        y = attention_of_codes(self.attn1, x, self.between, self.between)
        modulation = (*_modulation(self.norm3, scale2, shift2), self.norm3.eps)
        sums, x = cpu_layer_norm(hidden_states, y, gate1, *modulation, codes, *grid_of(first.proj))
        gelu = ("gelu", first.approximate)
        y = product(product(x, first.proj, codes, gelu, last), last, self.between)
        return cpu_gated_sum(sums, y, gate2)

    def _served(self, x: Tensor) -> bool:
        layers = _layers(self)
        parts = (self.norm1.norm, self.norm3, self.attn1, self.ff, *self.ff.net)
        return x.dtype == torch.float32 and x.ndim == 3 and runs_fused(x, *layers) and unhooked(*layers, *parts)


def _layers(block: Any) -> list[Any]:
    """Its products, in their order."""
    attn, ff = block.attn1, block.ff.net
    return [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], ff[0].proj, ff[2]]


def _modulation(norm: nn.LayerNorm, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(gain, shift) [B, C] of LayerNorm(x) (1 + scale) + shift, with the norm's own weight and bias in them."""
    gain = 1 + scale
    if norm.bias is not None:
        shift = shift + norm.bias * gain
    return (gain if norm.weight is None else gain * norm.weight), shift
