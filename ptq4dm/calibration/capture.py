"""Inputs of the layers and modules of one block on calibration calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks import hooked, input_of
from ..layers.base import numeric_padding
from ..pipelines.denoiser import evaluation_mode
from .calls import Calls
from .record import answers

MAX_ROWS = 8192  # token rows kept per layer
Resumed = Callable[[int], AbstractContextManager[None]]
"""Number of a batch -> what its call is made in, so that it begins where the batch stands in the model."""


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


def row_count(module: nn.Module, x: Tensor) -> int:
    """Rows of a layer's input: tokens of a Linear, windows of a convolution."""
    if not isinstance(module, nn.Conv2d):
        return x.numel() // x.shape[-1]
    height, width = _output_size(module, x)
    return len(x) * height * width


def as_rows(module: nn.Module, x: Tensor, picked: Tensor | None = None) -> Tensor:
    """A layer's input as rows [M, K], or those `picked` by number, with K in the order of its flattened weight.

    Of a grouped convolution K is that of all its groups, one after the other. Only the windows picked are gathered.
    """
    if not isinstance(module, nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
        return rows if picked is None else rows[picked]
    height, width = _output_size(module, x)
    picked = torch.arange(len(x) * height * width, device=x.device) if picked is None else picked
    (above, left), (down, right), (dy, dx) = numeric_padding(module), module.stride, module.dilation
    padded = F.pad(x, (left, left, above, above))
    image, place = picked // (height * width), picked % (height * width)
    y = (place // width * down)[:, None] + dy * torch.arange(module.kernel_size[0], device=x.device)
    z = (place % width * right)[:, None] + dx * torch.arange(module.kernel_size[1], device=x.device)
    windows = padded[image[:, None, None], :, y[:, :, None], z[:, None, :]]  # [R, kh, kw, C]
    return windows.permute(0, 3, 1, 2).flatten(1)


def input_peaks(module: nn.Module, x: Tensor) -> Tensor:
    """[K] largest magnitudes of a layer's input; of a convolution each is that of its whole channel."""
    if not isinstance(module, nn.Conv2d):
        return x.abs().reshape(-1, x.shape[-1]).amax(0)
    return x.abs().amax((0, 2, 3)).repeat_interleave(math.prod(module.kernel_size))


def _output_size(module: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    sizes = zip(x.shape[2:], numeric_padding(module), module.dilation, module.kernel_size, module.stride, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
    return height, width


@torch.no_grad()
def capture(
    model: nn.Module,
    layers: list[str],
    modules: list[str],
    batches: list[Calls],
    seed: int,
    resumed: Resumed = lambda _: nullcontext(),
) -> Captured:
    """Run the model on the batches, until the last of the layers and modules has been called.

    Of each batch MAX_ROWS / (number of batches) rows of a layer's input are kept, drawn with `seed`; inputs of
    modules are kept whole. resumed: no batch may stand behind a call of the layers and modules.
    """
    got = Captured(calls={name: [] for name in modules})
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    share = -(-MAX_ROWS // len(batches))
    waiting: set[str] = set()

    def of_layer(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = input_of(args, kwargs)
            if not x.numel():  # an expert that gets no token
                return
            peak, count = input_peaks(module, x).float(), row_count(module, x)
            got.peaks[name] = torch.maximum(got.peaks[name], peak) if name in got.peaks else peak
            got.lows[name] = min(got.lows.get(name, float("inf")), float(x.min()))
            picked = None
            if count > share:
                generator = torch.Generator("cpu").manual_seed(seed + len(kept[name]))
                picked = torch.randperm(count, generator=generator)[:share].to(x.device)
            kept[name].append(as_rows(module, x, picked).float())

        return hook

    def of_module(name: str) -> Callable:
        return lambda module, args, kwargs: got.calls[name].append((args, kwargs))

    def done(name: str) -> Callable:
        def hook(*_: object) -> None:
            waiting.discard(name)
            if not waiting:
                raise _Enough

        return hook

    before = {name: of_layer(name) for name in layers}
    inside = {name: of_module(name) for name in modules}
    after = {name: done(name) for name in {*layers, *modules}}
    # The model first: no other thread's calls reach the hooks.
    with evaluation_mode(model), hooked(model, before, after), hooked(model, inside):
        for place, batch in enumerate(batches):
            waiting = {*layers, *modules}
            with resumed(place), suppress(_Enough):
                answers(model, batch)
    got.rows = {name: torch.cat(parts) for name, parts in kept.items() if parts}
    return got
