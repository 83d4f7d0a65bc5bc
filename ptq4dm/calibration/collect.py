"""Timestep-aware calibration: run a pipeline's own sampler, record what its model sees, measure its layers.

Which timesteps are recorded is the collector's choice:

    uniform   t ~ U[0, T-1]
    ndtc      t ~ N(mu T, (sigma T)^2), clamped to [0, T-1]: Normally Distributed Time-step Calibration of
              PTQ4DM (Shang et al., CVPR 2023, section 3.3); sigma = 0 calibrates at one timestep
    solver    the sampling grid itself, each of its times equally often, dealt to the seeds at random: conditions
              that follow from seeds (class labels) meet all times
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_fields, check_seeds, checked, named_options
from ..errors import UserError
from ..files.claim import claimed
from ..files.places import check_room, output_folder, take_away_leavings
from ..options import option
from ..pipelines.denoiser import check_sampled, pipelines_in, schedulers_of, turn_at
from ..pipelines.sampling import MOST_STEPS, check_arguments, refusals
from ..progress import progress_bar
from ..undo import whole_or_not
from .call_files import save_calls
from .clock import Span
from .input_statistics import HISTOGRAM_BINS, InputStatistics
from .look import look
from .measure import binned_batches, update
from .request import Request, asked_of, found_in, new_header, request_of
from .sampled import record_components
from .store import CalibrationStore
from .store_files import (
    batch_path,
    fingerprints,
    load_statistics,
    recorded_calls,
    save_statistics,
    statistics_path,
    write_meta,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

COLLECTORS = ("uniform", "ndtc", "solver")
SAVE_EVERY = 20  # batches between two saves of the statistics
SURE = 0.9  # of the bytes that the batches to come are thought to take


@named_options
@dataclass(frozen=True)
class CalibrationConfig:
    """Choice of the calibration data.

    collector: "uniform", "ndtc" or "solver" (see above).
    num_samples: sampling trajectories; each gives one tuple (two with classifier-free guidance).
    num_inference_steps: steps of the pipeline's own sampler; recorded times are on its grid.
    mu, sigma: centre and width of the normal law of "ndtc", as fractions of T.
    num_bins: timestep bins of the layer statistics.
    batch_size: trajectories at a time. It does not change which tuples are recorded, but may change their
        last bits (other kernels run on other batch sizes).
    seed: trajectory i starts from the noise of seed + i.
    """

    collector: str = option("uniform", "law of the timesteps: uniform, ndtc or solver")
    num_samples: int = option(128, "sampling trajectories", low=1, high=10_000_000)
    num_inference_steps: int = option(20, low=1, high=MOST_STEPS)
    mu: float = option(0.4, "ndtc: mean, as a fraction of the timesteps", finite=False)
    sigma: float = option(0.4, "ndtc: deviation; 0 is a single timestep", finite=False)
    num_bins: int = option(10, "timestep bins of the statistics", low=1, high=10_000)
    batch_size: int = option(16, "trajectories at a time", low=1, high=1_000_000)
    seed: int = option(0, "seed of the first trajectory", low=0)

    def __post_init__(self) -> None:
        check_fields(self, "CalibrationConfig")
        if self.collector not in COLLECTORS:
            raise UserError(f"collector '{self.collector}' is unknown; choose from {', '.join(COLLECTORS)}.")
        if not (0 <= self.mu <= 1 and 0 <= self.sigma < math.inf):
            raise UserError(f"mu lies in [0, 1] and sigma is not negative; got {self.mu} and {self.sigma}.")
        check_seeds(self.seed, self.num_samples + 1)  # one more: `look` compares the first with the second


def draw_timesteps(config: CalibrationConfig, span: Span, grid: Sequence[float]) -> Tensor:
    """[num_samples] times in the scheduler's range, before they move to the nearest time of the sampling grid."""
    generator = torch.Generator("cpu").manual_seed(config.seed)
    if config.collector == "solver":
        times = torch.tensor(list(dict.fromkeys(grid)), dtype=torch.float64)  # some solvers repeat times
        turns = torch.randperm(config.num_samples, generator=generator)
        few = config.num_samples < len(times)  # spread them over the whole grid
        return times[turns * len(times) // config.num_samples if few else turns % len(times)]
    last = span.high - 1 if span.counts else span.high
    if config.collector == "uniform":
        draws = torch.rand(config.num_samples, generator=generator, dtype=torch.float64)
        return draws * (last - span.low) + span.low
    normal = torch.randn(config.num_samples, generator=generator, dtype=torch.float64)
    return span.time(normal * config.sigma + config.mu).clamp(span.low, last)


@checked
def collect(
    pipe: DiffusionPipeline,
    config: CalibrationConfig | None = None,
    output: str | os.PathLike | None = None,
    *,
    component: str | Sequence[str] | None = None,
    conditioning: dict[str, Any] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
) -> CalibrationStore:
    """Calibrate: record calls from the pipeline's own sampling, then measure every layer's input on them.

    Args:
        pipe: a diffusers pipeline in full precision, of images, videos or sounds.
        output: folder of the store; an unfinished one made with the same arguments is resumed. Without it the
            store is in a temporary folder, for as long as it is used. A second run into the folder waits where it
            has the same arguments, and then finds the store done; with others it is refused.
        component: the network to calibrate ("transformer_2", "controlnet", "prior"), or several; all denoisers of the
            pipeline by default.
        conditioning, pipeline_kwargs: as in `sampling.sample`, e.g. {"prompt": [...]} or {"prompt_embeds": tensor}.

    Returns:
        The store of the main denoiser; `store.components` has all of them.

    Raises:
        UserError: the folder holds another store, or is just being filled with one, the disk is full, a network is
            never called, or a layer sees NaN or infinity.
    """
    check_sampled(pipe)
    check_arguments(conditioning, pipeline_kwargs)
    config = config or CalibrationConfig()
    names = [component] if isinstance(component, str) else component
    request = request_of(
        pipe,
        names,
        num_inference_steps=config.num_inference_steps,
        conditioning=conditioning,
        pipeline_kwargs=pipeline_kwargs,
    )
    if output is None:
        temporary = tempfile.TemporaryDirectory()
        with refusals(pipe, conditioning, pipeline_kwargs):
            _collect_whole(request, config, Path(temporary.name), asked_of(request, config))
        return CalibrationStore.load(temporary.name, owner=temporary)
    folder, asked = Path(output), asked_of(request, config)
    found = found_in(folder, asked)
    if found is None or not found["complete"]:
        with output_folder(folder), claimed(folder, asked), refusals(pipe, conditioning, pipeline_kwargs):
            _collect_whole(request, config, folder, asked)
    else:  # killed right after it was done, the run before may have left something
        take_away_leavings(folder)
    return CalibrationStore.load(output)


def _collect_whole(request: Request, config: CalibrationConfig, folder: Path, asked: dict) -> None:
    """No other thread's sampling or quantizing comes between its batches; interrupted, the pipeline is as it was."""
    pipe = request.pipe
    with turn_at(pipe):
        parts = [part for one in pipelines_in(pipe) for part in (one, *schedulers_of(one).values())]
        networks = request.networks.values()
        whole_or_not([*parts, *networks], lambda gate: _collect(request, config, folder, asked))


def _collect(request: Request, config: CalibrationConfig, folder: Path, asked: dict) -> None:
    meta = found_in(folder, asked) or new_header(folder, config, request, asked)
    if meta["complete"]:
        return
    counts = [len(layers) * config.num_bins * HISTOGRAM_BINS * 8 for layers in fingerprints(meta).values()]
    begun = statistics_path(folder, meta, next(iter(fingerprints(meta)))).exists()
    again = max(counts) if config.num_samples > SAVE_EVERY * config.batch_size else 0  # the new beside the old
    statistics = 0 if begun else sum(counts) + again
    check_room(folder, statistics, "a calibration store")
    _record(folder, request, config, meta, statistics)
    _measure(folder, request, config, meta)
    write_meta(folder, {**meta, "complete": True})


def _record(folder: Path, request: Request, config: CalibrationConfig, meta: dict, statistics: int) -> None:
    """Phase 1: one file per batch of trajectories; batches already there are kept.

    statistics: bytes that the disk has to hold besides.
    """
    count = -(-config.num_samples // config.batch_size)
    if meta["num_batches"] > count:
        if batch_path(folder, count).exists():
            return
    elif all(batch_path(folder, index).exists() for index in range(count)) and not _missing(folder, meta):
        return
    sampling = look(request, config.seed)
    timesteps = draw_timesteps(config, sampling.span, sampling.grid.tolist())
    # From high t to low: trajectories that leave early share a batch, which then stops early.
    order = timesteps.argsort(descending=True, stable=True).split(config.batch_size)

    def batch(index: int, rows: Tensor, wanted: Request) -> None:
        if not batch_path(folder, index).exists():
            seeds = [config.seed + int(i) for i in rows]
            calls = record_components(wanted, seeds, timesteps[rows].tolist(), sampling)
            write_meta(folder, meta)
            save_calls(batch_path(folder, index), calls, meta.get("run", ""))

    checked = False
    for index, rows in enumerate(progress_bar(order, desc="collect", unit="batch")):
        new = not batch_path(folder, index).exists()
        batch(index, rows, request)
        if new and not checked:  # batches of one size take about the same bytes
            left = sum(len(one) for i, one in enumerate(order) if not batch_path(folder, i).exists())
            need = SURE * batch_path(folder, index).stat().st_size * left / len(rows) + statistics
            check_room(folder, int(need), "the rest of a calibration store")
            checked = True
    missing = _missing(folder, {**meta, "num_batches": count})
    if missing:  # the law of the timesteps left a network out: it is called at the nearest times that it has
        meta["num_batches"] = count + 1
        batch(count, order[-1], replace(request, components=missing))
        write_meta(folder, meta)


def _missing(folder: Path, meta: dict) -> list[str]:
    """The networks without any call."""
    return [name for name, calls in recorded_calls(folder, meta).items() if not len(calls)]


def _measure(folder: Path, request: Request, config: CalibrationConfig, meta: dict) -> None:
    """Phase 2: make the calls again, bin by bin, and measure what each layer is fed."""
    for name, calls in recorded_calls(folder, meta).items():
        batches = list(binned_batches(calls, config.num_bins, config.batch_size))
        layers = list(fingerprints(meta)[name])
        statistics, progress = InputStatistics(len(layers), config.num_bins), 0
        path = statistics_path(folder, meta, name)
        if path.exists():
            statistics, progress = load_statistics(path, (len(layers), config.num_bins), meta.get("run"))

        last = len(batches)

        def keep(done: int, path: Path = path, statistics: InputStatistics = statistics, last: int = last) -> None:
            if done % SAVE_EVERY == 0 or done == last:
                save_statistics(path, statistics, done, meta.get("run", ""))

        update(statistics, request.networks[name], layers, batches, progress, keep)
