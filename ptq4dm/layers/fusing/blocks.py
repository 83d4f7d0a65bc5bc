"""Fused forward passes of transformers: norms and products hand over what the next kernel reads.

Of layers that quantize their inputs in the call: SVDQuant's, and W8A8 ones with dynamic inputs, on a GPU.

    GELU                          the product, GELU on its sums
    FluxSingleTransformerBlock    norm + quantize, once for query, key, value and MLP | ... | attention and MLP
                                  quantized side by side for the product of both, without one tensor of both
    FluxTransformerBlock,         norm + quantize, once for query, key and value | ... | norm + quantize | MLP
    BasicTransformerBlock (DiT)

Attention keeps its processor, which is handed `Codes` in place of a tensor. Modules, parameters and names stay, and a
block computes unfused where fusing does not apply, as in ptq4dm/layers/fusing/fuse.py.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ..attention.processors import plain_processor
from .parts import (
    added_projections,
    before,
    codes_on_cpu,
    feed_forward,
    first,
    in_blocks,
    in_range,
    modulates,
    modulation,
    on_kernels,
    projections,
    read_codes,
    runs_fused,
    share,
    unweighted,
    widens,
)
from .report import FORM, why_left

Layers = tuple[list[list[nn.Module]], list[nn.Module]]  # that a block reads: those of one input together, the others
NONLINEARITY = {"none": "gelu", "tanh": "gelu_tanh"}  # by `approximate` of GELU


class FusedGELU(GELU):
    @staticmethod
    def read(module: GELU) -> Layers:
        return [], [module.proj]

    @staticmethod
    def fits(module: GELU) -> bool:
        fits = in_blocks(module.proj) and (module.proj.multiplies_floats or not module.proj.why_not_in_blocks())
        return fits and module.approximate in NONLINEARITY

    def forward(self, hidden_states: Any) -> Tensor:
        if self.training or not runs_fused([self.proj], []):
            return super().forward(hidden_states)
        return self.proj.multiply(hidden_states, NONLINEARITY[self.approximate])


class FusedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    @staticmethod
    def read(block: FluxSingleTransformerBlock) -> Layers:
        return [projections(block.attn)], [block.proj_mlp, block.proj_out]

    @staticmethod
    def fits(block: FluxSingleTransformerBlock) -> bool:
        attn, act = block.attn, block.act_mlp
        query = projections(attn)
        gelu = isinstance(act, nn.GELU) and act.approximate == "tanh"
        return gelu and modulates(block.norm) and read_codes(*query, block.proj_mlp, block.proj_out) and share(query)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        query, mlp, out = projections(self.attn), self.proj_mlp, self.proj_out
        passed_over = [self.norm, self.norm.norm, self.act_mlp, self.attn]
        plain = not self.training and type(plain_processor(self.attn.processor)) is FluxAttnProcessor
        if not (plain and runs_fused([*query, mlp, out], passed_over) and share(query)):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = modulation(self.norm, temb, 3)
        norm = (scale, shift, self.norm.norm.eps)
        codes = query[0].input_codes(x, norm=norm)
        widened = mlp.multiply(codes if share([*query, mlp]) else mlp.input_codes(x, norm=norm), "gelu_tanh")
        attended = self.attn(hidden_states=codes, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        x = in_range(x + gate[:, None] * out(out.input_codes(attended, widened)))
        words = encoder_hidden_states.shape[1]
        return x[:, :words], x[:, words:]


class FusedFluxTransformerBlock(FluxTransformerBlock):
    @staticmethod
    def read(block: FluxTransformerBlock) -> Layers:
        return [projections(block.attn), added_projections(block.attn)], [first(block.ff), first(block.ff_context)]

    @staticmethod
    def fits(block: FluxTransformerBlock) -> bool:
        image, text = projections(block.attn), added_projections(block.attn)
        norms = modulates(block.norm1) and modulates(block.norm1_context)
        norms = norms and unweighted(block.norm2) and unweighted(block.norm2_context)
        widening = widens(block.ff) and widens(block.ff_context)
        return norms and widening and read_codes(*image, *text) and share(image) and share(text)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        image, text = projections(self.attn), added_projections(self.attn)
        norms = [self.norm1, self.norm1.norm, self.norm1_context, self.norm1_context.norm]
        parts = [self.norm2, self.norm2_context, self.attn, *before(self.ff), *before(self.ff_context)]
        layers = [*image, *text, first(self.ff), first(self.ff_context)]
        plain = not self.training and type(plain_processor(self.attn.processor)) is FluxAttnProcessor
        if not (plain and runs_fused(layers, norms + parts) and share(image) and share(text)):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        shift, scale, gate, *rest = modulation(self.norm1, temb, 6)
        text_shift, text_scale, text_gate, *text_rest = modulation(self.norm1_context, temb, 6)
        attended, text_attended = self.attn(
            hidden_states=image[0].input_codes(hidden_states, norm=(scale, shift, self.norm1.norm.eps)),
            encoder_hidden_states=text[0].input_codes(
                encoder_hidden_states, norm=(text_scale, text_shift, self.norm1_context.norm.eps)
            ),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        x = feed_forward(hidden_states + gate[:, None] * attended, self.norm2, self.ff, *rest)
        words = encoder_hidden_states + text_gate[:, None] * text_attended
        return in_range(feed_forward(words, self.norm2_context, self.ff_context, *text_rest)), x


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Block of DiT, fused: self-attention alone, under adaptive norms."""

    @staticmethod
    def read(block: BasicTransformerBlock) -> Layers:
        return [projections(block.attn1)], [first(block.ff)]

    @staticmethod
    def fits(block: BasicTransformerBlock) -> bool:
        if block.norm_type != "ada_norm_zero" or not (modulates(block.norm1) and unweighted(block.norm3)):
            return False
        attn, query = block.attn1, projections(block.attn1)
        alone = block.attn2 is None and block.pos_embed is None and not hasattr(block, "fuser")
        norms = (attn.group_norm, attn.spatial_norm, attn.norm_cross)
        plain = type(attn) is Attention and not any(norms) and not attn.residual_connection
        return alone and plain and widens(block.ff) and read_codes(*query) and share(query)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None, class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        query = projections(self.attn1)
        passed_over = [self.norm1, self.norm1.norm, self.norm3, self.attn1, *before(self.ff)]
        plain = type(plain_processor(self.attn1.processor)) is AttnProcessor2_0 and not cross_attention_kwargs
        plain = plain and self._chunk_size is None and hidden_states.ndim == 3 and not self.training
        if not (plain and runs_fused([*query, first(self.ff)], passed_over) and share(query)):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        norm = self.norm1
        embedding = norm.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        shift, scale, gate, *rest = modulation(norm, embedding, 6)
        attended = self.attn1(
            query[0].input_codes(hidden_states, norm=(scale, shift, norm.norm.eps)), attention_mask=attention_mask
        )
        return feed_forward(hidden_states + gate[:, None] * attended, self.norm3, self.ff, *rest)


def why_not(module: nn.Module, kind: Any) -> str:
    """Why a module is not fused as this kind of `KINDS`."""
    try:
        together, others = kind.read(module)
        read = [layer for layers in [*together, others] for layer in layers]
    except AttributeError:  # no part of that name
        return FORM
    if read_codes(*read) and not all(map(share, together)):
        return "its query, key and value do not share codes"
    return why_left(module, None, read)


def served(module: nn.Module) -> bool:
    """Whether kernels serve all layers of a fused module where it is."""
    together, others = type(module).read(module)
    return all(in_blocks(layer) and on_kernels(layer) for layers in [*together, others] for layer in layers)


KINDS: dict[type, Any] = {
    GELU: FusedGELU,
    FluxSingleTransformerBlock: FusedFluxSingleTransformerBlock,
    FluxTransformerBlock: FusedFluxTransformerBlock,
    BasicTransformerBlock: FusedBasicTransformerBlock,
}
for plain, kind in KINDS.items():
    kind.on_cpu = codes_on_cpu
    kind.__name__ = plain.__name__  # by which diffusers finds blocks to compile and not to split among devices
