"""The steps of `optimize`, each done to one network, which notes what was done, or why not, and how to undo it."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.faster import FasterAttention
from ..layers.fusing.cpu import has_between, has_bfloat16, runs_fused_on_cpu
from ..layers.fusing.fuse import fuse, is_fused, unfuse
from .blocks import as_a_whole, compile_blocks, compiled_whole, plain_forward, repeated_blocks, uncompile_blocks
from .graphs import Backend, Graphed
from .report import OptimizedModel
from .weight_cache import Refreshed, WeightCache


def fuse_modules(one: OptimizedModel, precision: str | None) -> None:
    """Fuse what is known to be faster fused; values between products in `precision` on a CPU."""
    if any(is_fused(module) for module in one.model.modules()):
        one.left["fusing"] = "it is fused already"
        return
    asked = precision
    if precision is None:
        precision = "bfloat16" if one.device.type == "cpu" and has_bfloat16() else "float32"
    one.fused = fuse(one.model, precision)
    if one.device.type == "cpu":
        if not runs_fused_on_cpu(one.model):  # of kinds that are fused on a GPU alone
            unfuse(one.model)
            one.fused = None
            if asked is not None:
                one.left["precision"] = "no module of it is fused on this CPU"
            return
        if has_between(one.model):
            one.precision = precision
        elif asked is not None:
            one.left["precision"] = "its fused modules hand on codes and float32 alone"
    one.takes_back.append(lambda: unfuse(one.model))


def choose_attention(one: OptimizedModel) -> None:
    """Attention in 8 bits where that is faster."""
    try:
        one.attention = FasterAttention(one.model)
    except ValueError as error:
        one.left["attention"] = str(error)
    else:
        one.takes_back.append(one.attention.undo)


def compile_network(one: OptimizedModel) -> None:
    """Let torch.compile have the repeated blocks, or the network as a whole."""
    blocks = repeated_blocks(one.model)
    if any(module._compiled_call_impl is not None for module in one.model.modules()):
        one.left["blocks"] = "some are compiled already"
    elif as_a_whole(one.model):
        if not forward_is_taken(one, "compiling"):
            one.whole = compiled_whole(one.model)
            put(one, one.whole)
    elif not blocks:
        one.left["blocks"] = "no class of blocks is repeated"
    else:
        compile_blocks(blocks)
        one.blocks = blocks
        one.takes_back.append(lambda: uncompile_blocks(blocks))


def keep_weights_of(one: OptimizedModel, cache: WeightCache | None) -> None:
    """Keep weights of 4 bits in 8, and look at their codes before every call."""
    if cache is None:
        one.left["weight_cache"] = "no layer unpacks a weight to 8 bits in its calls"
    elif forward_is_taken(one, "weight_cache"):
        cache.clear()
    else:
        one.cache = cache
        one.takes_back.append(cache.clear)
        put(one, Refreshed(one.model, cache, one.compute))


def replay_calls(one: OptimizedModel, kept: int) -> None:
    """Calls from graphs; so many of them are kept."""
    if forward_is_taken(one, "graphs"):
        return
    graphed = one.graphed = Graphed(one.model, backend(one.device), kept, one.compute)
    put(one, graphed)
    one.takes_back.append(graphed.clear)


def forward_is_taken(one: OptimizedModel, what: str) -> bool:
    """Whether somebody else has put a function in the place of the network's forward; then that is said."""
    now = vars(one.model).get("forward")
    if now == plain_forward(one.model):  # a copy of an optimized network has it
        del one.model.forward
    elif now is not None and now is not one.compute:
        one.left[what] = "its forward is another's already (a hook of accelerate)"
        return True
    return False


def put(one: OptimizedModel, forward: Any) -> None:
    """Let the network compute by this, until it is taken back."""
    before = vars(one.model).get("forward")
    one.model.forward = one.compute = forward

    def back() -> None:
        if vars(one.model).get("forward") is forward:
            del one.model.forward
            if before is not None:
                one.model.forward = before

    one.takes_back.append(back)


def has_graphs(device: torch.device) -> bool:
    """Whether calls can be replayed there."""
    return device.type == "cuda"


def backend(device: torch.device) -> Backend:
    """What captures graphs there."""
    from .cuda_graphs import CudaGraphs

    return CudaGraphs(device)
