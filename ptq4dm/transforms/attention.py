"""The streams of diffusers' attention: softmax(Q K^T) V is linear in V, and bilinear in Q and K.

Attention is known by its class and its processor together, as the processor does the computing. What is not in the
table (fused projections, adapters, other libraries) has no streams here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .streams import COLUMNS, ROWS, End, Stream, is_norm, whole


def each(size: int) -> Tensor:
    """No rotary embedding: every channel of a head is its own."""
    return torch.arange(size)


def adjacent(size: int) -> Tensor:
    """Channels 2 i and 2 i + 1 of a head turn together."""
    return torch.arange(size) // 2


def thirds(size: int) -> Tensor:
    """Three parts of a head (time, height, width), in each the channels i and i + half turn together (Allegro)."""
    third = size // 3
    i = torch.arange(size)
    return i // third * third + i % third % (third // 2)


# (attention, processor), by file and class of diffusers -> which channels of a head of Q and K turn together:
# channels of one number; None where what lies between is nonlinear, or is not known here.
PLAIN = "attention_processor.Attention"
WAN = ("transformer_wan.WanAttention", "transformer_wan.WanAttnProcessor")
KNOWN: dict[tuple[str, str], Callable[[int], Tensor] | None] = {
    (PLAIN, "attention_processor.AttnProcessor"): each,
    (PLAIN, "attention_processor.AttnProcessor2_0"): each,
    (PLAIN, "attention_processor.JointAttnProcessor2_0"): each,
    (PLAIN, "attention_processor.CogVideoXAttnProcessor2_0"): adjacent,
    (PLAIN, "attention_processor.AllegroAttnProcessor2_0"): thirds,
    (PLAIN, "attention_processor.SanaLinearAttnProcessor2_0"): None,  # ReLU
    (PLAIN, "sana_transformer.SanaAttnProcessor2_0"): each,
    ("transformer_flux.FluxAttention", "transformer_flux.FluxAttnProcessor"): adjacent,
    WAN: adjacent,  # in self-attention
    ("transformer_ltx.LTXAttention", "transformer_ltx.LTXVideoAttnProcessor"): None,  # more than one way to turn
}
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def value_streams(model: nn.Module) -> list[Stream]:
    """From the value projections to the output projections, per channel of V.

    In joint attention both modalities' values go to both outputs: they are one stream. Where the text's attention
    leaves the module without a projection (the last block of SD3) there is none.
    """
    found = []
    for name, attention, _ in _known(model):
        size = _rows(attention.to_v)
        if size != attention.inner_dim or size % attention.heads:  # several heads read one value
            continue
        writers = _ends(name, attention, ROWS, "to_v", "add_v_proj")
        readers = _ends(name, attention, COLUMNS, "to_out.0", "to_add_out")
        block = name.rpartition(".")[0]
        if not readers and class_of(model.get_submodule(block)) == "transformer_flux.FluxSingleTransformerBlock":
            readers = (End(f"{block}.proj_out", COLUMNS),)  # it reads attention and hidden units, in this order
        unread = len(writers) == 2 and getattr(attention, "context_pre_only", None)
        if readers and not unread:
            found.append(Stream(writers, readers, size, attention.heads))
    return whole(model, found)


def query_key_streams(model: nn.Module) -> list[tuple[Stream, Tensor]]:
    """(from the keys to the queries, the number [K] of what each channel turns with).

    Where keys and queries are normalized, the stream goes from norm to norm: their weights come last. A norm that all
    heads share has a stream of one head's channels, which are then the same in all heads. Only where what lies
    between these and the product is a rotary embedding or nothing.
    """
    found = {}
    for name, attention, turning in _known(model):
        size, heads = _rows(attention.to_k), attention.heads
        keys = _last(name, attention, ("to_k", "norm_k"), ("add_k_proj", "norm_added_k"))
        queries = _last(name, attention, ("to_q", "norm_q"), ("add_q_proj", "norm_added_q"))
        sizes = {_channels(model.get_submodule(end.name)) for end in (*keys, *queries)}
        if (
            passes_norms_by(attention)
            or turning is None
            or size != attention.inner_dim
            or size % heads
            or len(keys) != len(queries)
        ):
            continue
        width = size // heads
        if sizes == {size}:
            numbers = torch.cat([turning(width) + head * width for head in range(heads)])
            found[Stream(keys, queries, size, heads)] = numbers
        elif sizes == {width}:
            found[Stream(keys, queries, width)] = turning(width)
    return [(stream, found[stream]) for stream in whole(model, found)]


def _last(name: str, attention: Any, *pairs: tuple[str, str]) -> tuple[End, ...]:
    """Ends at the norm of each pair (projection, norm) that a module has, or else at the projection."""
    ends = [_ends(name, attention, ROWS, *pair) for pair in pairs]
    return tuple(end[-1] for end in ends if end)


def passes_norms_by(attention: Any) -> bool:
    """Whether an attention has norms that its processor, an older one, does not use."""
    older = class_of(attention.processor) == "attention_processor.AttnProcessor"
    return older and any(getattr(attention, norm, None) is not None for norm in NORMS)


def _channels(layer: nn.Module) -> int:
    """How many channels a projection or norm writes; 0 of what is neither."""
    return len(layer.weight) if is_norm(layer) else _rows(layer)


def _known(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name, module, its entry in KNOWN) of every attention that is known."""
    for name, module in model.named_modules():
        key = class_of(module), class_of(getattr(module, "processor", None))
        if key in KNOWN and not module.fused_projections:
            yield name, module, each if key == WAN and module.is_cross_attention else KNOWN[key]


def _rows(layer: nn.Module) -> int:
    return layer.out_features if type(layer) is nn.Linear else 0


def _ends(name: str, module: nn.Module, axis: int, *children: str) -> tuple[End, ...]:
    """Ends at those children that a module has."""
    there = [child for child in children if getattr(module, child.partition(".")[0], None) is not None]
    return tuple(End(f"{name}.{child}".lstrip("."), axis) for child in there)


def class_of(thing: object) -> str:
    """ "file.class" of what belongs to diffusers' models; "" of anything else."""
    where = type(thing).__module__
    return f"{where.rpartition('.')[2]}.{type(thing).__qualname__}" if where.startswith("diffusers.models.") else ""
