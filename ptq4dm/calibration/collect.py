"""Timestep-aware calibration: run a pipeline's own sampler, record what its model sees, measure its layers.

Which timesteps are recorded is the collector's choice:

    uniform   t ~ U[0, T-1]
    ndtc      t ~ N(mu T, (sigma T)^2), clamped to [0, T-1]: Normally Distributed Time-step Calibration of
              PTQ4DM (Shang et al., CVPR 2023, section 3.3); sigma = 0 calibrates at one timestep
    solver    the sampling grid itself, each of its times equally often
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_fields, check_seeds, checked
from ..errors import UserError
from ..files.places import output_folder
from ..layers.base import holds_quantized
from ..options import option
from ..pipelines.denoiser import check_sampled, schedulers_of
from ..pipelines.sampling import MOST_STEPS, check_arguments, refusals
from .call_files import save_calls
from .calls import parameter_place
from .clock import Span
from .input_statistics import InputStatistics, check_size
from .look import look
from .measure import binned_batches, update
from .request import Request, request_of
from .sampled import record_components
from .store import (
    VERSION,
    CalibrationStore,
    batch_path,
    fingerprint,
    fingerprints,
    load_statistics,
    read_meta,
    recorded_calls,
    save_statistics,
    statistics_path,
    write_meta,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

COLLECTORS = ("uniform", "ndtc", "solver")
SAVE_EVERY = 20  # batches between two saves of the statistics


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
        turns = torch.arange(config.num_samples)
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
            store is in a temporary folder, for as long as it is used.
        component: the network to calibrate ("transformer_2", "controlnet", "prior"), or several; all denoisers of the
            pipeline by default.
        conditioning, pipeline_kwargs: as in `sampling.sample`, e.g. {"prompt": [...]} or {"prompt_embeds": tensor}.

    Returns:
        The store of the main denoiser; `store.components` has all of them.

    Raises:
        UserError: the folder holds another store, a network is never called, or a layer sees NaN or infinity.
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
            _collect(request, config, Path(temporary.name))
        return CalibrationStore.load(temporary.name, owner=temporary)
    with output_folder(Path(output)), refusals(pipe, conditioning, pipeline_kwargs):
        _collect(request, config, Path(output))
    return CalibrationStore.load(output)


def _collect(request: Request, config: CalibrationConfig, folder: Path) -> None:
    meta = _start(folder, config, request)
    if meta["complete"]:
        return
    _record(folder, request, config, meta)
    _measure(folder, request, config, meta)
    write_meta(folder, {**meta, "complete": True})


def _start(folder: Path, config: CalibrationConfig, request: Request) -> dict:
    """The store's header: a new one, or that of the interrupted run that these arguments continue."""
    schedulers = schedulers_of(request.pipe)
    networks = request.networks
    asked: dict[str, Any] = {
        "version": VERSION,
        "config": asdict(config),
        "dtype": {name: str(parameter_place(network)[1]) for name, network in networks.items()},
        "scheduler": {
            name: {"class": type(one).__name__, **_describe(dict(one.config))} for name, one in schedulers.items()
        },
        "conditioning": _describe(request.options["conditioning"]),
        "pipeline_kwargs": _describe(request.options["pipeline_kwargs"]),
        "fingerprint": {name: fingerprint(network) for name, network in networks.items()},
    }
    for name, network in networks.items():
        if holds_quantized(network):
            raise UserError(f"'{name}' is quantized already; calibrate it in full precision.")
        if not asked["fingerprint"][name]:
            raise UserError(f"'{name}' has no Linear or Conv2d layers to calibrate.")
        check_size(len(asked["fingerprint"][name]), config.num_bins)
    if (folder / "store.json").exists():
        meta = read_meta(folder)
        different = [name for name, value in asked.items() if meta.get(name) != value]
        if different:
            raise UserError(
                f"{folder} already holds a calibration store that differs in {', '.join(different)}; "
                "give another folder or delete it."
            )
        return meta
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into {folder}; give another folder.")
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and is no calibration store; give another folder.")
    # It is written with the first batch: arguments that cannot be sampled with leave no store behind.
    main = next(iter(schedulers.values()))
    return {
        **asked,
        "num_train_timesteps": int(main.config.get("num_train_timesteps") or 1000),
        "num_batches": -(-config.num_samples // config.batch_size),
        "complete": False,
    }


def _record(folder: Path, request: Request, config: CalibrationConfig, meta: dict) -> None:
    """Phase 1: one file per batch of trajectories; batches already there are kept."""
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
            save_calls(batch_path(folder, index), calls)

    for index, rows in enumerate(tqdm(order, desc="collect", unit="batch")):
        batch(index, rows, request)
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
            statistics, progress = load_statistics(path)

        last = len(batches)

        def keep(done: int, path: Path = path, statistics: InputStatistics = statistics, last: int = last) -> None:
            if done % SAVE_EVERY == 0 or done == last:
                save_statistics(path, statistics, done)

        update(statistics, request.networks[name], layers, batches, progress, keep)


def _describe(value: Any) -> Any:
    """A JSON form of settings for comparing stores: tensors by shape and sum, other objects by their class."""
    if isinstance(value, dict):
        return {str(k): _describe(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), float(value.double().sum())]
    if isinstance(value, (list, tuple, range)):
        return [_describe(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
