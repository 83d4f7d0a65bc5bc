"""The calibration tuples that blocks are trained on, and where in the model they stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration.calls import Calls
from ..calibration.evidence import Evidence
from ..walk.walk import Walk, Walks


@dataclass
class Tuples:
    """Batches, which are one call of the model each, on their way from block to block.

    exact: in full precision; behind: the same, through the part that is quantized. reference: calls whose statistics
    correct the distribution of inputs.
    """

    exact: Walk
    behind: Walk
    reference: Walk

    @staticmethod
    def of(walks: Walks, batches: list[Calls], reference: Sequence[Calls] = ()) -> Tuples:
        """Tuples that stand at the model's input."""
        return Tuples(walks.over(batches), walks.over(batches), walks.over(list(reference)))

    @property
    def batches(self) -> list[Calls]:
        return self.exact.batches

    def on(self, stops: Collection[str], before: Mapping[str, nn.Module]) -> None:
        """Go on to the first call of any of some modules: of all that is still to come, see `Walk.on`."""
        self.exact.on(stops, {})
        self.reference.on(stops, {})
        if before:
            self.behind.on(stops, before)

    def at(self, place: int, before: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Calls of the model on one batch begin where it stands, behind the quantized part where there is one."""
        return (self.behind if before else self.exact).resumed(place)


def first_call(walk: Walk, place: int, name: str, before: Mapping[str, nn.Module] | None = None) -> Any:
    """(args, kwargs) of the first call of a module on one batch of a walk; None where it has none."""
    model, batch = walk.model, walk.batches[place]
    calls = Evidence(model, [], [name], [batch], before=dict(before or {}), resumed=lambda _: walk.resumed(place))
    return next(iter(calls.calls(name)), None)
