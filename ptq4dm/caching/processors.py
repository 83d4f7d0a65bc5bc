"""Processors of diffusers for cross-attention whose keys and values come out of a `TextCache`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..hooks import unhooked
from ..kernels.attention.layer import kernel_name, kv4_attention
from ..transforms.attention import PLAIN, WAN, class_of, passes_norms_by
from .text_cache import TextCache

# (attention, processor), by file and class of diffusers -> whether norms of queries and keys see all heads as one
SERVED = {
    (PLAIN, "attention_processor.AttnProcessor2_0"): False,
    (PLAIN, "attention_processor.AttnProcessor"): False,
    (PLAIN, "sana_transformer.SanaAttnProcessor2_0"): True,
    WAN: True,
}


def why_not(attn: nn.Module) -> str:
    """Why a cross-attention is not served, as the end of a sentence; "" where it is."""
    key = class_of(attn), class_of(attn.processor)
    if isinstance(attn.processor, CachedText):
        return "its text is kept already"
    if key not in SERVED:
        return f"its processor is {type(attn.processor).__name__}, of {type(attn).__name__}"
    if getattr(attn, "add_k_proj", None) is not None:
        return "it has keys of an image, or of a second text, beside those of the text"
    if passes_norms_by(attn):
        return "its processor does not use its norms of queries and keys"
    if attn.fused_projections:
        return "its projections are fused; unfuse_qkv_projections() makes them single again"
    if any(getattr(attn, name, None) is not None for name in ("group_norm", "spatial_norm")):
        return "it normalizes an image before the queries"
    if attn.inner_dim != getattr(attn, "inner_kv_dim", getattr(attn, "kv_inner_dim", None)):
        return "several of its heads share keys"
    return ""


class CachedText:
    """Computes what the processor `original` of `attn` does, with keys and values out of a cache. Without a text it
    hands over."""

    def __init__(self, attn: nn.Module, cache: TextCache) -> None:
        self.original, self.cache = attn.processor, cache
        key = class_of(attn), class_of(attn.processor)
        self.plain, self.joined = key[0] == PLAIN, SERVED[key]
        self.scale = attn.scale if class_of(attn.processor).endswith(".AttnProcessor") else None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, M, C] over a text [B, L, C'] -> [B, M, C]; attention_mask as the original takes it."""
        text = encoder_hidden_states
        if not isinstance(text, Tensor) or hidden_states.ndim != 3:
            more = {} if temb is None else {"temb": temb}
            return self.original(attn, hidden_states, text, attention_mask, **more, **kwargs)
        if attention_mask is not None and self.plain:
            batch, tokens, _ = text.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query = _heads(attn, attn.to_q, attn.norm_q, hidden_states, self.joined)
        parts = (attn.to_k, attn.to_v, attn.norm_k, getattr(attn, "norm_cross", None))
        waited_for = any(not unhooked(*part.modules()) for part in parts if part is not None)
        make = functools.partial(_keys_and_values, attn, text, self.joined)
        stored = self.cache.of(attn, () if waited_for else parts, text, make)
        y = self._attend(query, stored, attention_mask)
        y = y.transpose(1, 2).flatten(2).to(query.dtype)
        y = attn.to_out[1](attn.to_out[0](y))
        if self.plain and attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor if self.plain else y

    def _attend(self, query: Tensor, stored: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """[B, H, M, d] by the cache's format."""
        if self.cache.bits == 4:
            self.cache.kernels[kernel_name(query.device, query.dtype)] += 1
            return kv4_attention(query, *stored, mask, self.scale or query.shape[-1] ** -0.5)
        key, value = (one.to(query.dtype) for one in stored)
        if hasattr(self.original, "_attention_backend"):  # it takes [B, M, H, d]
            q, k, v = (one.transpose(1, 2) for one in (query, key, value))
            backend = self.original._attention_backend
            self.cache.kernels[str(backend or "diffusers' attention")] += 1
            return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend).transpose(1, 2)
        self.cache.kernels["torch's attention"] += 1
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)


def _keys_and_values(attn: Any, text: Tensor, joined: bool) -> tuple[Tensor, Tensor]:
    """Of a text [B, L, C'] -> both [B, H, L, d], as they go into the products."""
    if getattr(attn, "norm_cross", None) is not None:
        text = attn.norm_encoder_hidden_states(text)
    return _heads(attn, attn.to_k, attn.norm_k, text, joined), _heads(attn, attn.to_v, None, text, joined)


def _heads(attn: Any, layer: Callable, norm: Callable | None, x: Tensor, joined: bool) -> Tensor:
    """x [B, L, C] -> layer(x) in heads, [B, H, L, d], normalized: each by itself, or joined all as one."""
    y = layer(x)
    if norm is not None and joined:
        y = norm(y)
    y = y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return y if norm is None or joined else norm(y)
