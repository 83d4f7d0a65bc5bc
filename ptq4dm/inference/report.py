"""What `optimize` did, what it left and why, and how calls went since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..attention.faster import FasterAttention
from ..layers.fusing.report import FuseReport
from .blocks import Compiled
from .graphs import Graphed
from .weight_cache import WeightCache


@dataclass
class OptimizedModel:
    """One denoiser: what was done to it. left: what was not done -> why. compute: what was put as its forward."""

    model: nn.Module
    device: torch.device
    fused: FuseReport | None = None
    precision: str = ""  # of what lies between the products of fused modules, on a CPU
    keeps_memory: bool = False
    blocks: list[nn.Module] = field(default_factory=list)
    whole: Compiled | None = None
    cache: WeightCache | None = None
    attention: FasterAttention | None = None
    compute: Any = None
    graphed: Graphed | None = None
    through: Any = None  # an engine's forward (engines.py), with lines() and products()
    left: dict[str, str] = field(default_factory=dict)
    takes_back: list[Callable[[], None]] = field(default_factory=list)

    def __reduce__(self) -> tuple:
        """A copy of the network is not optimized, and has none of this."""
        return type(None), ()

    def undo(self) -> None:
        """Take everything back, the last first."""
        while self.takes_back:
            self.takes_back.pop()()

    def lines(self) -> list[str]:
        """What is said of it."""
        lines = [] if self.fused is None else str(self.fused).splitlines()
        if self.precision:
            lines.append(f"between the products of fused modules values are in {self.precision}")
        if self.keeps_memory:
            lines.append("memory that a call leaves is kept for the next, up to a GiB")
        if kinds := Counter(type(block).__name__ for block in self.blocks):
            what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            lines.append(f"blocks compiled by torch.compile when they are first called: {what}")
        if self.whole is not None:
            lines.append("compiled as a whole by torch.compile when it is first called")
        if self.attention is not None:
            lines += self.attention.lines()
        if self.cache is not None:
            lines += self.cache.lines()
        if self.graphed is not None:
            lines += self._graph_lines(self.graphed)
        if self.through is not None:
            lines += self.through.lines()
        return [*lines, *(f"{what}: left, for {why}" for what, why in self.left.items())]

    def _graph_lines(self, graphed: Graphed) -> list[str]:
        lines = [
            f"graphs of at most {graphed.kept} forms of its arguments: {len(graphed.graphs)} now, "
            f"{graphed.captures} captured, {graphed.dropped} dropped, {graphed.replays} calls replayed"
        ]
        return [*lines, *(f"{count} calls as they are: {why}" for why, count in graphed.plain.items())]


class Optimized:
    """models: name of a denoiser -> what was done to it; printed, a short table that grows with the calls."""

    def __init__(self, undo: Callable[[nn.Module], None]) -> None:
        self.models: dict[str, OptimizedModel] = {}
        self._undo = undo

    def undo(self) -> None:
        """Take it all back; as `ptq4dm.unoptimize`."""
        for one in self.models.values():
            self._undo(one.model)

    def __str__(self) -> str:
        lines = []
        for name, one in self.models.items():
            lines.append(f"{f'{name}, ' if name else ''}{type(one.model).__name__} on {one.device}")
            lines += [f"  {line}" for line in one.lines() or ["nothing is known to help here"]]
        return "\n".join(lines)
