"""Peaks: the largest magnitudes in the channels of what Linear layers are fed and give, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..hooks import hooked, input_of
from .attention import NORMS
from .streams import is_norm


@dataclass
class Peaks:
    """Evidence for transforms: layer name -> float32 [K] of its input, [N] of its output. Norms of queries and keys
    count as layers."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def peak(self, name: str) -> Tensor | None:
        return self.inputs.get(name)

    def output_peak(self, name: str) -> Tensor | None:
        return self.outputs.get(name)


@contextmanager
def watch_peaks(model: nn.Module) -> Iterator[Peaks]:
    """Peaks of all Linear layers of a model, and of the norms of its queries and keys, over every call of it inside
    the `with` block."""
    peaks = Peaks()

    def watch(name: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            _raise_to(peaks.inputs, name, input_of(args, kwargs))
            _raise_to(peaks.outputs, name, output)

        return hook

    layers = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (name.rpartition(".")[2] in NORMS and is_norm(layer))
    ]
    with hooked(model, after={name: watch(name) for name in layers}):
        yield peaks


def _raise_to(found: dict[str, Tensor], name: str, values: Tensor) -> None:
    peak = values.detach().abs().flatten(0, -2).amax(0).float()
    found[name] = torch.maximum(found[name], peak) if name in found else peak
