"""Measure what layers are fed on recorded calls, timestep bin by timestep bin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..hooks import hooked, input_of
from ..pipelines.denoiser import evaluation_mode
from .input_statistics import InputStatistics
from .record import Calls, replay
from .store import CalibrationStore


def measured(model: nn.Module, store: CalibrationStore) -> InputStatistics:
    """Statistics of a model's layers on the calls of a store, as `collect` measures them."""
    config, layers = store.config, list(store.fingerprint)
    batches = binned_batches(store.recorded(), config["num_bins"], store.num_train_timesteps, config["batch_size"])
    statistics = InputStatistics(len(layers), config["num_bins"])
    update(statistics, model, layers, list(batches))
    return statistics


def update(
    statistics: InputStatistics,
    model: nn.Module,
    layers: list[str],
    batches: list[tuple[int, Calls]],
    progress: int = 0,
    after: Callable[[int], None] = lambda done: None,
) -> None:
    """Replay batches but for the first `progress`, and add what the layers are fed; after(number of batches done)."""
    watch = _Measured(statistics)
    before = {name: watch.hook(index, name) for index, name in enumerate(layers)}
    with evaluation_mode(model), hooked(model, before):  # in this order: no other thread's calls reach the hooks
        for done, (bin_index, batch) in enumerate(tqdm(batches, desc="measure", unit="batch")):
            if done < progress:
                continue
            watch.bin_index = bin_index
            replay(model, batch)
            after(done + 1)


@dataclass
class _Measured:
    """Statistics, and the timestep bin of the batch that is being replayed."""

    statistics: InputStatistics
    bin_index: int = 0

    def hook(self, layer: int, name: str) -> Callable:
        def add_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
            try:
                self.statistics.update(layer, self.bin_index, input_of(args, kwargs))
            except UserError as error:
                raise UserError(f"layer '{name}', timestep bin {self.bin_index}: {error}") from None

        return add_input


def binned_batches(
    calls: Calls, num_bins: int, num_train_timesteps: int, batch_size: int
) -> Iterator[tuple[int, Calls]]:
    """(bin, Calls) batches in which all rows are of one timestep bin: [b, b+1) T / num_bins."""
    bins = timestep_bins(calls.timestep, num_bins, num_train_timesteps)
    for index in range(num_bins):
        rows = (bins == index).nonzero().flatten()
        for part in rows.split(batch_size) if len(rows) else ():
            yield index, calls[part]


def timestep_bins(timestep: Tensor, num_bins: int, num_train_timesteps: int) -> Tensor:
    """[B] bin indices. Models that are called with t in [0, 1] (flow matching) are scaled up first."""
    t = timestep.double()
    if timestep.is_floating_point() and float(t.max()) <= 1.0:
        t = t * num_train_timesteps
    return (t * num_bins / num_train_timesteps).floor().clamp(0, num_bins - 1).long()
