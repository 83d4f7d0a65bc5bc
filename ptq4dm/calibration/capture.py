"""Inputs of the layers and modules of one block on calibration calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.base import numeric_padding
from ..pipelines.denoiser import evaluation_mode
from .record import Calls, replay

MAX_ROWS = 8192  # token rows kept per layer


class _Enough(Exception):
    """Raised once the block has run: what comes after it need not."""


@dataclass
class Captured:
    """rows: layer -> [R, K] float32 inputs; peaks: layer -> [K] largest magnitude of all inputs; lows: layer -> the
    least input; calls: module -> [(args, kwargs)]."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)
    lows: dict[str, float] = field(default_factory=dict)
    calls: dict[str, list] = field(default_factory=dict)


def as_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as rows [M, K], with K in the order of its flattened weight; of a grouped convolution K is that
    of all its groups, one after the other."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding in ((0, 0), 0, "valid", "same"):
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    padding = numeric_padding(module)
    windows = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # [B, C kh kw, pixels]
    return windows.transpose(1, 2).reshape(-1, windows.shape[1])


@torch.no_grad()
def capture(model: nn.Module, layers: list[str], modules: list[str], batches: list[Calls], seed: int) -> Captured:
    """Run the model on the batches, until the last of the layers and modules has been called.

    Of each batch MAX_ROWS / (number of batches) rows of a layer's input are kept, drawn with `seed`; inputs of
    modules are kept whole.
    """
    got = Captured(calls={name: [] for name in modules})
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    share = -(-MAX_ROWS // len(batches))
    waiting: set[str] = set()

    def of_layer(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = as_rows(module, args[0] if args else next(iter(kwargs.values()))).float()
            peak = x.abs().amax(0)
            got.peaks[name] = torch.maximum(got.peaks[name], peak) if name in got.peaks else peak
            got.lows[name] = min(got.lows.get(name, float("inf")), float(x.min()))
            if len(x) > share:
                generator = torch.Generator("cpu").manual_seed(seed + len(kept[name]))
                x = x[torch.randperm(len(x), generator=generator)[:share].to(x.device)]
            kept[name].append(x)

        return hook

    def of_module(name: str) -> Callable:
        return lambda module, args, kwargs: got.calls[name].append((args, kwargs))

    def done(name: str) -> Callable:
        def hook(*_: object) -> None:
            waiting.discard(name)
            if not waiting:
                raise _Enough

        return hook

    with evaluation_mode(model):  # before the hooks are there: no other thread's calls reach them
        watched = [(name, of_layer) for name in layers] + [(name, of_module) for name in modules]
        handles = [
            model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            for name, hook in watched
        ]
        handles += [model.get_submodule(name).register_forward_hook(done(name)) for name in {*layers, *modules}]
        try:
            for batch in batches:
                waiting = {*layers, *modules}
                with suppress(_Enough):
                    replay(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    got.rows = {name: torch.cat(parts) for name, parts in kept.items() if parts}
    return got
