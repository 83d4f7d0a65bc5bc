"""A budget of memory spent on weights of 4 bits that are kept in 8, where that saves most of a step for its bytes.

    gain of a layer = time that unpacking its weight takes, measured / bytes of the weight in 8 bits

Layers are taken in the order of their gain as long as they fit; of those of one size, in the order of the model, so
that of repeated blocks at most one kind of layer is kept in some and unpacked in others: torch.compile makes code for
each combination. The time is that of unpacking alone: in calls that unpack beside quantizing their input it is partly
hidden. Codes are looked at before every forward pass: a layer whose codes were changed or moved unpacks again.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..checks import shown
from ..errors import UserError
from ..kernels.tuning import stopwatch
from ..kernels.w4.layer import unpacked
from .blocks import plain_forward
from .unpacked import KeepsUnpacked

UNITS = {f"{prefix}{unit}B": base**power for unit, base in (("", 1000), ("I", 1024))
         for power, prefix in enumerate(("", "K", "M", "G", "T"))}  # fmt: skip
ALIKE = 16  # layers of a size that are timed in turn: together more than a cache holds, where they are large


def bytes_of(budget: Any) -> int:
    """Bytes of "4GB", "500 MB", "2GiB" or a whole number. Raises UserError for anything else."""
    if type(budget) is int and budget > 0:
        return budget
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", budget.upper()) if isinstance(budget, str) else None
    size = round(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if size < 1:
        raise UserError(f'optimize: weight_cache is memory such as "4GB" or "500MB", or bytes; got {shown(budget)}.')
    return size


@dataclass
class WeightCache:
    """What a denoiser keeps. kept: layers by name; left: how many the budget had no room for; saves: microseconds of
    unpacking in a call of each of `kept`; dropped: layers that were changed since."""

    budget: int
    kept: dict[str, KeepsUnpacked] = field(default_factory=dict)
    left: int = 0
    saves: float = 0.0
    dropped: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that are taken now."""
        return sum(t.nbytes for layer in self.kept.values() for t in layer.eight_bits() if t is not None)

    def refresh(self) -> None:
        """Drop what was made of codes that have changed."""
        wrong = [
            name for name, one in self.kept.items() if one.eight_bits()[0] is None or not one.unpacked_is_right()
        ]
        for name in wrong:
            self.kept.pop(name).drop_unpacked()
            self.dropped.append(name)

    def clear(self) -> None:
        """Give the memory back."""
        for layer in self.kept.values():
            layer.drop_unpacked()
        self.kept.clear()

    def lines(self) -> list[str]:
        """What is said of it."""
        lines = [
            f"weights of {len(self.kept)} layers kept in 8 bits: {self.nbytes / 1e9:.2f} GB more, which saves "
            f"{self.saves / 1e3:.2f} ms of unpacking in a step"
        ]
        if self.left:
            lines.append(f"{self.left} layers unpack in every call: no room for them in {self.budget / 1e9:.2f} GB")
        if self.dropped:
            lines.append(f"{len(self.dropped)} layers unpack again, for their codes changed ('{self.dropped[0]}')")
        return lines


class Refreshed:
    """A denoiser's forward that looks first whether what is kept is still right."""

    def __init__(self, model: nn.Module, cache: WeightCache, compute: Callable | None) -> None:
        """compute: what the network computes by; None: its class's forward."""
        self.model, self.cache, self.compute = model, cache, compute or plain_forward(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.cache.refresh()
        return self.compute(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return plain_forward, (self.model,)


def keep_weights(models: dict[str, nn.Module], budget: int) -> dict[str, WeightCache]:
    """Name of a denoiser -> what it keeps, of one budget for all; without those that have no layer that unpacks.

    Raises UserError where the memory for it is not free.
    """
    layers = [
        (owner, name, layer)
        for owner, model in models.items()
        for name, layer in model.named_modules()
        if isinstance(layer, KeepsUnpacked) and layer.unpacks()
    ]
    kinds: dict[tuple, list[KeepsUnpacked]] = defaultdict(list)
    for _, _, layer in layers:
        kinds[_kind(layer)].append(layer)
    times = {kind: _microseconds(alike) for kind, alike in kinds.items()}
    order = sorted(kinds, key=lambda kind: -times[kind] / _size(kinds[kind][0]))
    caches = {owner: WeightCache(budget) for owner, _, _ in layers}
    chosen, left = [], budget
    for kind in order:
        for owner, name, layer in layers:
            if _kind(layer) == kind:
                fits = _size(layer) <= left
                chosen += [(owner, name, layer)] * fits
                left -= _size(layer) * fits
                caches[owner].left += not fits
    _check_room([layer for _, _, layer in chosen])
    for owner, name, layer in chosen:
        layer.keep_unpacked()
        caches[owner].kept[name] = layer
        caches[owner].saves += times[_kind(layer)]
    return caches


def _kind(layer: KeepsUnpacked) -> tuple:
    return layer.qweight.device, tuple(layer.qweight.shape), layer.wscales.dtype, layer.plan.activation


def _size(layer: KeepsUnpacked) -> int:
    """Bytes of a weight [N, K] in 8 bits with its float32 scales: one an output, or of all groups."""
    groups = layer.wscales.numel() if layer.plan.activation == "int4" else len(layer.wscales)
    return 2 * layer.qweight.numel() + 4 * groups


def _microseconds(layers: list[KeepsUnpacked]) -> float:
    """That unpacking one of these weights takes."""
    calls: list[Callable] = [
        functools.partial(unpacked, one.qweight, one.wscales, one.plan.activation) for one in layers[:ALIKE]
    ]
    device = layers[0].qweight.device
    if device.type != "cuda":
        return stopwatch.on_cpu(calls)
    with torch.cuda.device(device):
        return stopwatch.microseconds(calls)


def _check_room(layers: list[KeepsUnpacked]) -> None:
    wanted: dict[torch.device, int] = defaultdict(int)
    for layer in layers:
        wanted[layer.qweight.device] += _size(layer)
    for device, size in wanted.items():
        if device.type != "cuda":
            continue
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + idle
        if size > free:
            raise UserError(
                f"optimize: weight_cache asks for {size / 1e9:.1f} GB on {device}, and {free / 1e9:.1f} GB are free."
            )
