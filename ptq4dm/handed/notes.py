"""Who reads what a module hands on: seen at its first call, and asked for at each later one.

Nothing says beforehand which layers read a norm: between them lies Python. So the first call of a fused module hands
its value on to whoever comes, and notes which quantized layers asked for codes. From then on a norm that none of them
reads computes as before, and so does a module whose layers share nothing; and only hooks of modules on the way from
one to the other are looked for. Compiled code does not learn: there what is computed after all costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..hooks import unhooked
from .value import same_key


class Notes:
    """Of one fused module. least: how many layers of one key a value has to be read by.

    own: the module and those around it, up to where its readers' begin. paths: each layer that may read it -> the
    modules around that, below where both are.
    """

    def __init__(
        self, least: int, own: Iterable[nn.Module], paths: Mapping[nn.Module, tuple[nn.Module, ...]]
    ) -> None:
        self.least, self.own, self.paths = least, tuple(own), dict(paths)
        self.calls = 0
        self.readers: dict[Any, list[tuple[Any, nn.Module]]] = {}  # of each slot: keys and layers
        self.wanted: tuple[Any, ...] | None = None  # slots that are handed on; None: not known yet
        self.watched = self._on_the_way(self.paths)

    def read(self, slot: Any, key: Any, layer: nn.Module) -> None:
        """Note that a layer asked for codes."""
        if self.wanted is None:
            self.readers.setdefault(slot, []).append((key, layer))

    def open(self) -> bool:
        """Whether the call that begins hands on what it has: some of it is read, and no hook waits for a tensor."""
        if torch.compiler.is_compiling():
            return self.open_now()
        is_open = self.settled() != () and unhooked(*self.watched)
        self.calls += is_open
        return is_open

    @torch.compiler.assume_constant_result
    def open_now(self) -> bool:
        """The same while torch.compile traces: asked once, for it does not look for later hooks either."""
        return self.wanted != () and unhooked(*self.watched)

    def settled(self) -> tuple[Any, ...] | None:
        """What is handed on, None before the first call."""
        if self.wanted is None and self.calls:
            self._settle()
        return self.wanted

    def wants(self, slot: Any) -> bool:
        """Whether this value is to be handed on."""
        return self.wanted is None or slot in self.wanted

    def _settle(self) -> None:
        kept = {}
        for slot, reads in self.readers.items():
            for key, _ in reads:
                layers = {layer for other, layer in reads if same_key(other, key)}
                if len(layers) >= self.least:
                    kept[slot] = reads
        self.wanted = tuple(kept)
        found = [layer for reads in kept.values() for _, layer in reads]
        self.watched = self._on_the_way({layer: self.paths.get(layer, (layer,)) for layer in found})

    def _on_the_way(self, paths: Mapping[nn.Module, tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
        modules = [*self.own, *(module for path in paths.values() for module in path)]
        return tuple({id(module): module for module in modules}.values())
