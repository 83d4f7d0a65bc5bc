"""FLUX's attention in 8 bits, its norms and rotary embedding in the kernel that makes codes of queries and keys.

By diffusers' own processor they are kernels of their own, which write queries and keys twice. What is computed is the
same but for roundings to 16 bits between the steps, which are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from ...hooks import unhooked

PROCESSOR = transformer_flux.FluxAttnProcessor


def serves(processor: Any, attn: nn.Module, encoder_hidden_states: Any, mask: Any, places: Any) -> bool:
    """Whether a call is of the plain form: no mask, no backend of its own, and norms that the kernel knows."""
    joint = attn.added_kv_proj_dim is not None
    norms = [attn.norm_q, attn.norm_k, *([attn.norm_added_q, attn.norm_added_k] if joint else [])]
    known = all(type(norm) is nn.RMSNorm and norm.weight is not None and norm.eps is not None for norm in norms)
    plain = mask is None and processor._attention_backend is None and processor._parallel_config is None
    return (
        plain
        and known
        and joint == (encoder_hidden_states is not None)
        and isinstance(places, tuple)
        and len({norm.eps for norm in norms}) == 1
        and unhooked(*norms)
        and not torch.is_grad_enabled()
    )


def attend(
    attn: Any,
    compute: Callable[..., Tensor],
    kind: str,
    hidden_states: Any,
    encoder_hidden_states: Any,
    places: tuple,
) -> Any:
    """What the processor gives, its attention by one of the ops that take a rotary embedding."""
    given = transformer_flux._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    joint = encoder_hidden_states is not None  # without a text diffusers has (None,) or None in the place of its own
    q, k, v, *words = (x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for x in given[: 6 if joint else 3])
    norms = (attn.norm_added_q.weight, attn.norm_added_k.weight) if joint else (None, None)
    cos, sin = (x.to(q.device) for x in places)
    y = compute(
        q, k, v, attn.head_dim**-0.5, kind, attn.norm_q.weight, attn.norm_k.weight, cos, sin, attn.norm_q.eps,
        *(words if joint else (None,) * 3), *norms,
    )  # fmt: skip
    y = y.transpose(1, 2).flatten(2, 3)
    if not joint:
        return y
    text, image = y.split_with_sizes([words[0].shape[2], q.shape[2]], 1)
    image = attn.to_out[1](attn.to_out[0](image.contiguous()))
    return image, attn.to_add_out(text.contiguous())
