"""Measure what layers are fed on recorded calls, timestep bin by timestep bin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError
from ..hooks import hooked, input_of
from ..pipelines.denoiser import evaluation_mode
from ..progress import progress_bar
from .calls import Calls
from .input_statistics import InputStatistics
from .record import answers
from .store import CalibrationStore, fingerprint, source_of

BINS, BATCH = 10, 16  # of calls that somebody recorded


def measured(
    model: nn.Module, store: CalibrationStore, turns: Mapping[str, Callable[[Tensor], Tensor]] | None = None
) -> InputStatistics:
    """Statistics of a model's layers on the calls of a store, as `collect` measures them.

    turns: layer -> what becomes of its input before it is quantized; such layers are measured behind it.
    """
    config, layers = store.config, list(store.fingerprint)
    batches = binned_batches(store.recorded(), config["num_bins"], config["batch_size"])
    statistics = InputStatistics(len(layers), config["num_bins"])
    update(statistics, model, layers, list(batches), turns=turns or {})
    return statistics


def store_of(model: nn.Module, calls: Calls) -> CalibrationStore:
    """A store of calls that were recorded with `record`: what the model's layers are fed is measured on them.

    Raises UserError where there are no calls.
    """
    if not len(calls):
        raise UserError("no calls were recorded; call the model within `with ptq4dm.record(model)`.")
    if calls.source and calls.source != source_of(model):
        raise UserError("the calls were recorded from another model (or other weights); record those of this one.")
    config = {"num_bins": BINS, "batch_size": BATCH}
    store = CalibrationStore(
        config, fingerprint(model), 1000, calls[calls.time.argsort(descending=True, stable=True)]
    )
    store.statistics = measured(model, store)
    return store


def update(
    statistics: InputStatistics,
    model: nn.Module,
    layers: list[str],
    batches: list[tuple[int, Calls]],
    progress: int = 0,
    after: Callable[[int], None] = lambda done: None,
    turns: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """Replay batches but for the first `progress`, and add what the layers are fed; after(number of batches done)."""
    watch = _Measured(statistics, turns or {})
    before = {name: watch.hook(index, name) for index, name in enumerate(layers)}
    with evaluation_mode(model), hooked(model, before):  # in this order: no other thread's calls reach the hooks
        for done, (bin_index, batch) in enumerate(progress_bar(batches, desc="measure", unit="batch")):
            if done < progress:
                continue
            watch.bin_index = bin_index
            answers(model, batch)
            after(done + 1)


@dataclass
class _Measured:
    """Statistics, and the timestep bin of the batch that is being replayed."""

    statistics: InputStatistics
    turns: Mapping[str, Callable[[Tensor], Tensor]]
    bin_index: int = 0

    def hook(self, layer: int, name: str) -> Callable:
        def add_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
            try:
                x = input_of(args, kwargs)
                self.statistics.update(layer, self.bin_index, self.turns[name](x) if name in self.turns else x)
            except UserError as error:
                raise UserError(f"layer '{name}', timestep bin {self.bin_index}: {error}") from None

        return add_input


def binned_batches(calls: Calls, num_bins: int, batch_size: int) -> Iterator[tuple[int, Calls]]:
    """(bin, one call) in which all units are of one timestep bin: [b, b+1) / num_bins of the scheduler's range."""
    bins = timestep_bins(calls.time, num_bins)
    for index in range(num_bins):
        for batch in calls[(bins == index).nonzero().flatten()].batches(batch_size):
            yield index, batch


def timestep_bins(time: Tensor, num_bins: int) -> Tensor:
    """[U] bin indices of times [U] in [0, 1]. A time at an edge, but for rounding, is in the bin above."""
    return (time.double() * num_bins + 1e-5).floor().clamp(0, num_bins - 1).long()
