"""Processors of diffusers whose attention is computed in 8 bits: everything else in them stays as it is.

All that such a processor computes around attention (projections, norms, rotary embeddings, joined texts) is done by
its own code. Only where it calls torch's scaled_dot_product_attention, also by way of diffusers' attention backends
that do so, the op of kernels/attention/layer8.py computes instead.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ...kernels.attention.layer8 import attention8, kernel_name
from . import flux
from .faster import attention_faster
from .state import Attention8

_DERIVED: dict[Any, Any] = {}  # class of processors -> the class made of it


def in_8_bits(processor: Any, state: Attention8, name: str) -> Any:
    """A copy of a processor that hands its attention to `state`; its class is derived from the processor's.

    name: of its layer.
    """
    new = copy.copy(processor)
    new.__class__ = _derived(type(processor))
    new._attention8 = state, name, processor
    new._kind8 = state.kind_of(name)
    return new


def plain_processor(processor: Any) -> Any:
    """The processor that another one was made of by `in_8_bits`; any other as it is."""
    return processor._attention8[2] if hasattr(processor, "_attention8") else processor


def _derived(kind: Any) -> Any:
    if kind not in _DERIVED:
        _DERIVED[kind] = _made(kind)
    return _DERIVED[kind]


def _made(kind: Any) -> Any:
    @functools.wraps(kind.__call__)  # diffusers looks at the names of its arguments
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._attention8[0]
        if not state.active:
            return kind.__call__(self, *args, **kwargs)
        # Code that is compiled counts nothing; if it knew the layer by its name, it would be of that layer alone.
        name = "" if torch.compiler.is_compiling() and state.redirected is None else self._attention8[1]
        state.called(name)
        if kind is flux.PROCESSOR and state.redirected is None and (found := _of_flux(self, *args, **kwargs)):
            attn = args[0] if args else kwargs["attn"]
            compute = _op(state, name, kernel_name(attn.norm_q.weight.device, attn.head_dim))
            return flux.attend(attn, compute, self._kind8, *found)
        with state.redirected(name) if state.redirected else Redirected(state, name, self._kind8):
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


class Redirected(TorchFunctionMode):
    """In this block scaled_dot_product_attention computes in 8 bits, where the op can; `state` counts both.

    kind: of the codes; the state's where it is None.
    """

    def __init__(self, state: Attention8, name: str, kind: str | None = None) -> None:
        super().__init__()
        self.state, self.name, self.kind = state, name, kind or state.kind

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.unflatten:  # its own code torch.compile cannot follow in a mode
            return torch.unflatten(*args, **kwargs)
        if function is not scaled_dot_product_attention:
            return function(*args, **kwargs)
        why = why_not(*args, **kwargs)
        if why:
            self.state.in_16(self.name, why)
            return function(*args, **kwargs)
        return self._attend(function, *args, **kwargs)

    def _attend(self, function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        compute = _op(self.state, self.name, kernel_name(query.device, query.shape[-1]))
        scale = kwargs.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return compute(query, key, value, scale, self.kind)


def _op(state: Attention8, name: str, kernel: str) -> Callable[..., Tensor]:
    """The op that computes a layer's attention; the call is counted."""
    state.in_8(name, f"{kernel}, or in 16 where that is faster" if state.faster else kernel)
    return attention_faster if state.faster else attention8


def _of_flux(
    processor: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
    image_rotary_emb: Any = None,
) -> tuple | None:  # fmt: skip
    """(hidden states, those of the text, rotary embedding) of a call whose norms the codes' kernel can compute."""
    if flux.serves(processor, attn, encoder_hidden_states, attention_mask, image_rotary_emb):
        return hidden_states, encoder_hidden_states, image_rotary_emb
    return None


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """Why a call of scaled_dot_product_attention stays as it is; "" where the op computes it."""
    if attn_mask is not None or is_causal:
        return "it has a mask"
    if dropout_p:
        return "it drops weights"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "gradients are wanted"
    if query.ndim != 4 or query.shape[:2] != key.shape[:2] or key.shape != value.shape:
        return "its heads are of several sizes, or share keys"
    return ""
