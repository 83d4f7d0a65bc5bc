"""Fused forward passes of transformers with SVDQuant layers: norms and products hand over what the next kernel reads.

    GELU                          the product, GELU on its sums
    FluxSingleTransformerBlock    norm + quantize, once for query, key, value and MLP | ... | attention and MLP
                                  quantized side by side for the product of both, without one tensor of both
    FluxTransformerBlock,         norm + quantize, once for query, key and value | ... | norm + quantize | MLP
    BasicTransformerBlock (DiT)

Attention keeps its processor, which is handed `Codes` in place of a tensor. Modules, parameters and names stay, and a
block computes unfused where fusing does not apply, as in ptq4dm/fuse.py.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ..fuse import FUSED, unhooked
from ..kernels import svdq_linear
from .modules import SVDQLinear

NONLINEARITY = {"none": "gelu", "tanh": "gelu_tanh"}  # by `approximate` of GELU


class FusedGELU(GELU):
    @staticmethod
    def fits(module: GELU) -> bool:
        return type(module.proj) is SVDQLinear and module.approximate in NONLINEARITY

    def forward(self, hidden_states) -> Tensor:
        if self.training or not _runs_fused([self.proj], []):
            return super().forward(hidden_states)
        return self.proj.multiply(hidden_states, NONLINEARITY[self.approximate])


class FusedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    @staticmethod
    def fits(block: FluxSingleTransformerBlock) -> bool:
        attn, act = block.attn, block.act_mlp
        query = _projections(attn)
        gelu = isinstance(act, nn.GELU) and act.approximate == "tanh"
        return (
            gelu and _modulates(block.norm) and _read_codes(*query, block.proj_mlp, block.proj_out) and _share(query)
        )

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
        joint_attention_kwargs=None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        query, mlp, out = _projections(self.attn), self.proj_mlp, self.proj_out
        passed_over = [self.norm, self.norm.norm, self.act_mlp, self.attn]
        plain = not self.training and type(self.attn.processor) is FluxAttnProcessor
        if not (plain and _runs_fused([*query, mlp, out], passed_over) and _share(query)):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = _modulation(self.norm, temb, 3)
        norm = (scale, shift, self.norm.norm.eps)
        codes = query[0].codes(x, norm=norm)
        widened = mlp.multiply(codes if _share([*query, mlp]) else mlp.codes(x, norm=norm), "gelu_tanh")
        attended = self.attn(hidden_states=codes, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = _in_range(x + gate[:, None] * out(out.codes(attended, widened)))
        words = encoder_hidden_states.shape[1]
        return x[:, :words], x[:, words:]


class FusedFluxTransformerBlock(FluxTransformerBlock):
    @staticmethod
    def fits(block: FluxTransformerBlock) -> bool:
        image, text = _projections(block.attn), _added_projections(block.attn)
        norms = _modulates(block.norm1) and _modulates(block.norm1_context)
        norms = norms and _plain(block.norm2) and _plain(block.norm2_context)
        widening = _widens(block.ff) and _widens(block.ff_context)
        return norms and widening and _read_codes(*image, *text) and _share(image) and _share(text)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb=None,
        joint_attention_kwargs=None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        image, text = _projections(self.attn), _added_projections(self.attn)
        norms = [self.norm1, self.norm1.norm, self.norm1_context, self.norm1_context.norm]
        passed_over = [
            *norms,
            self.norm2,
            self.norm2_context,
            self.attn,
            *_before(self.ff),
            *_before(self.ff_context),
        ]
        layers = [*image, *text, _first(self.ff), _first(self.ff_context)]
        plain = not self.training and type(self.attn.processor) is FluxAttnProcessor
        if not (plain and _runs_fused(layers, passed_over) and _share(image) and _share(text)):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        shift, scale, gate, *rest = _modulation(self.norm1, temb, 6)
        text_shift, text_scale, text_gate, *text_rest = _modulation(self.norm1_context, temb, 6)
        attended, text_attended = self.attn(
            hidden_states=image[0].codes(hidden_states, norm=(scale, shift, self.norm1.norm.eps)),
            encoder_hidden_states=text[0].codes(
                encoder_hidden_states, norm=(text_scale, text_shift, self.norm1_context.norm.eps)
            ),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x = _feed_forward(hidden_states + gate[:, None] * attended, self.norm2, self.ff, *rest)
        words = encoder_hidden_states + text_gate[:, None] * text_attended
        return _in_range(_feed_forward(words, self.norm2_context, self.ff_context, *text_rest)), x


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Of DiT: self-attention alone, under adaptive norms."""

    @staticmethod
    def fits(block: BasicTransformerBlock) -> bool:
        if block.norm_type != "ada_norm_zero" or not (_modulates(block.norm1) and _plain(block.norm3)):
            return False
        attn, query = block.attn1, _projections(block.attn1)
        alone = block.attn2 is None and block.pos_embed is None and not hasattr(block, "fuser")
        norms = (attn.group_norm, attn.spatial_norm, attn.norm_cross)
        plain = type(attn) is Attention and not any(norms) and not attn.residual_connection
        return alone and plain and _widens(block.ff) and _read_codes(*query) and _share(query)

    def forward(
        self, hidden_states: Tensor, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
        timestep=None, cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
    ) -> Tensor:  # fmt: skip
        query = _projections(self.attn1)
        passed_over = [self.norm1, self.norm1.norm, self.norm3, self.attn1, *_before(self.ff)]
        plain = type(self.attn1.processor) is AttnProcessor2_0 and not cross_attention_kwargs
        plain = plain and self._chunk_size is None and hidden_states.ndim == 3 and not self.training
        if not (plain and _runs_fused([*query, _first(self.ff)], passed_over) and _share(query)):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        norm = self.norm1
        embedding = norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        shift, scale, gate, *rest = _modulation(norm, embedding, 6)
        attended = self.attn1(
            query[0].codes(hidden_states, norm=(scale, shift, norm.norm.eps)), attention_mask=attention_mask
        )
        return _feed_forward(hidden_states + gate[:, None] * attended, self.norm3, self.ff, *rest)


KINDS = {
    GELU: FusedGELU,
    FluxSingleTransformerBlock: FusedFluxSingleTransformerBlock,
    FluxTransformerBlock: FusedFluxTransformerBlock,
    BasicTransformerBlock: FusedBasicTransformerBlock,
}
for plain, kind in KINDS.items():
    kind.__name__ = plain.__name__  # by which diffusers finds blocks to compile and not to split among devices
FUSED |= KINDS


def _feed_forward(x: Tensor, norm: nn.LayerNorm, ff: FeedForward, shift, scale, gate) -> Tensor:
    """x + gate * ff(norm(x) * (1 + scale) + shift)."""
    return x + gate[:, None] * ff(_first(ff).codes(x, norm=(scale, shift, norm.eps)))


def _modulation(norm: nn.Module, embedding: Tensor, parts: int) -> tuple[Tensor, ...]:
    """What an adaptive norm makes of an embedding [B, K]: shift, scale, gate, each [B, K]; twice where it has six."""
    return norm.linear(norm.silu(embedding)).chunk(parts, dim=1)


def _in_range(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x  # as FLUX's blocks have it


def _projections(attn: nn.Module) -> list[nn.Module]:
    return [attn.to_qkv] if attn.fused_projections else [attn.to_q, attn.to_k, attn.to_v]


def _added_projections(attn: nn.Module) -> list[nn.Module]:
    return [attn.to_added_qkv] if attn.fused_projections else [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]


def _first(ff: FeedForward) -> nn.Module:
    return ff.net[0].proj


def _before(ff: FeedForward) -> list[nn.Module]:
    """What passes an input on to the first layer."""
    return [ff, ff.net[0]]


# ------------------------------------------------------------------------------------------------ what fits


def _plain(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine


def _modulates(norm: nn.Module) -> bool:
    return type(norm) in (AdaLayerNormZero, AdaLayerNormZeroSingle) and _plain(norm.norm)


def _widens(ff: nn.Module) -> bool:
    return type(ff) is FeedForward and type(ff.net[0]) in (GELU, FusedGELU) and _read_codes(_first(ff))


def _read_codes(*layers: nn.Module) -> bool:
    return all(
        type(layer) is SVDQLinear and layer.plan.activation != "none" and layer.plan.group_size == 64
        for layer in layers
    )


def _share(layers: list[nn.Module]) -> bool:
    """Whether codes for the first of the layers are codes for all: smoothing and branch are one, without adapters."""
    if len(layers) == 1:
        return True
    lenders = [layer._lender[0] if layer._lender else layer for layer in layers]
    return all(one is lenders[0] for one in lenders) and all(layer.lora_down is None for layer in layers)


def _runs_fused(layers: list[nn.Module], passed_over: list[nn.Module]) -> bool:
    """Whether kernels serve the layers, and nothing waits for calls of modules that get codes, or no call at all."""
    kind = all(type(layer) is SVDQLinear for layer in layers)
    return kind and _on_kernels(layers[0]) and unhooked(*layers, *passed_over)


def _on_kernels(layer: SVDQLinear) -> bool:
    return layer.kernel_name() != svdq_linear.REFERENCE
