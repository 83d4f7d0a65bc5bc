"""One walk through a model, from block to block: each batch goes on where it stopped.

    walk = Walks(model).over(batches)
    for block in blocks:                       # in the order of their calls
        walk.on(names of this block and of all later ones, layers that are quantized)
        with walk.resumed(i): ...              # calls of the model on batch i begin where it stands

What is over is kept as long as something after it reads it (needed.py), on the model's device up to KEPT_BYTES, then
on the CPU up to HOST_BYTES. Batches beyond run from their start. What calls give depends on none of this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.utils import _pytree as pytree

from ..calibration.calls import Calls
from ..calibration.evidence import substituted
from ..pipelines.denoiser import evaluation_mode
from .dataflow import Dataflow
from .finished import Finished, finished_before, size_of, skipping
from .leaves import away
from .needed import Needed, needed_after
from .watching import dataflow_of

KEPT_BYTES = 2 * 2**30  # on an accelerator that the model is on, of all walks through it
HOST_BYTES = 8 * 2**30  # on the CPU


class Walks:
    """The walks through one model: what they share."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device_room, self.host_room = KEPT_BYTES, HOST_BYTES
        self._flows: dict[str, Dataflow] = {}

    def over(self, batches: list[Calls]) -> Walk:
        """A walk on batches, which are one call each; it stands at the model's input."""
        return Walk(self, batches)

    def flow_of(self, batch: Calls) -> tuple[str, Dataflow]:
        """(the signature of a batch, the dataflow of its calls): seen on one unit, by the model in full precision."""
        group = int(batch.places[0, 0])
        key = batch.groups[group].key
        if key not in self._flows:
            self._flows[key] = dataflow_of(self.model, batch[:1])
        return key, self._flows[key]

    def take(self, done: Finished) -> Finished | None:
        """What is over of a batch, where there is room for it; None where there is none."""
        device, host = _bytes(done)
        if device > self.device_room:
            done = [one._replace(output=pytree.tree_map(away, one.output)) for one in done]
            device, host = _bytes(done)
        if device > self.device_room or host > self.host_room:
            return None
        self.device_room -= device
        self.host_room -= host
        return done

    def give_back(self, done: Finished) -> None:
        """Room for other batches."""
        device, host = _bytes(done)
        self.device_room += device
        self.host_room += host


class Walk:
    """Batches that stand somewhere in a model. `done`: of each what is over, None where it begins at the input."""

    def __init__(self, walks: Walks, batches: list[Calls]) -> None:
        self.walks, self.model, self.batches = walks, walks.model, batches
        self.done: list[Finished | None] = [[] for _ in batches]
        self._own: dict[int, Dataflow] = {}

    def on(self, stops: Collection[str], layers: Mapping[str, nn.Module]) -> None:
        """Go on to the first call of any of some modules, with layers in place of those of their names.

        Nothing that is in `layers` for the first time may have been passed: so `stops` are all that is still to come.
        """
        with evaluation_mode(self.model):
            needed = self._needed(stops)
            room = True
            with substituted(self.model, dict(layers)):
                # Those without room come last, as long as one of them finds some.
                for i in sorted(range(len(self.batches)), key=lambda i: self.done[i] is None):
                    if self.done[i] is not None or room:
                        room = self._move(i, stops, needed[i])

    @contextmanager
    def resumed(self, place: int) -> Iterator[None]:
        """Let calls of the model on a batch begin where it stands; with the same layers in it as in `on`."""
        with skipping(self.model, self.done[place] or []):
            yield

    def _needed(self, stops: Collection[str]) -> list[Needed]:
        """Of each batch what is needed: what one of its kind needs, or where that varies, what it needs itself."""
        flows = [self.walks.flow_of(batch) for batch in self.batches]
        of_kind = {key: needed_after(flow, stops) for key, flow in dict(flows).items()}
        found = [of_kind[key] for key, _ in flows]
        for i, batch in enumerate(self.batches):
            if found[i].varies and found[i].reads is not None:
                if i not in self._own:
                    self._own[i] = dataflow_of(self.model, batch)
                found[i] = needed_after(self._own[i], stops)
        return found

    def _move(self, place: int, stops: Collection[str], needed: Needed) -> bool:
        """Move one batch. Whether there was room for it."""
        batch, done = self.batches[place], self.done[place] or []
        found = finished_before(self.model, stops, batch, done, needed.reads, needed.opened)
        if [one.key for one in found] != needed.keys:  # it goes another way than the unit that was looked at
            found = finished_before(self.model, stops, batch, done, None, needed.opened)
        self.walks.give_back(done)
        self.done[place] = self.walks.take(found)
        return self.done[place] is not None


def _bytes(done: Finished) -> tuple[int, int]:
    """Bytes that are kept on an accelerator, and on the CPU."""
    return size_of(done, on_cpu=False), size_of(done, on_cpu=True)
