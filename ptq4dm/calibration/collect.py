"""Timestep-aware calibration: run a pipeline's own sampler, record what its model sees, measure its layers.

Which timesteps are recorded is the collector's choice:

    uniform   t ~ U[0, T-1]
    ndtc      t ~ N(mu T, (sigma T)^2), clamped to [0, T-1]: Normally Distributed Time-step Calibration of
              PTQ4DM (Shang et al., CVPR 2023, section 3.3); sigma = 0 calibrates at one timestep
    solver    the sampling grid itself, each of its times equally often
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import UserError
from ..files.atomic import output_folder
from ..layers.base import is_quantized
from ..options import option
from ..pipelines.denoiser import denoiser
from .input_statistics import InputStatistics
from .measure import binned_batches, update
from .record import Calls, record_calls
from .store import (
    CalibrationStore,
    batch_path,
    fingerprint,
    load_calls,
    load_statistics,
    read_meta,
    save_calls,
    save_statistics,
    write_meta,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

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
    num_samples: int = option(128, "sampling trajectories")
    num_inference_steps: int = 20
    mu: float = option(0.4, "ndtc: mean, as a fraction of the timesteps")
    sigma: float = option(0.4, "ndtc: deviation; 0 is a single timestep")
    num_bins: int = option(10, "timestep bins of the statistics")
    batch_size: int = option(16, "trajectories at a time")
    seed: int = option(0, "seed of the first trajectory")

    def __post_init__(self) -> None:
        if self.collector not in COLLECTORS:
            raise UserError(f"collector '{self.collector}' is unknown; choose from {', '.join(COLLECTORS)}.")
        for name in ("num_samples", "num_inference_steps", "num_bins", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.seed < 0:
            raise UserError(f"seed must not be negative; got {self.seed}.")
        if not (0 <= self.mu <= 1 and 0 <= self.sigma < math.inf):
            raise UserError(f"mu lies in [0, 1] and sigma is not negative; got {self.mu} and {self.sigma}.")


def draw_timesteps(config: CalibrationConfig, num_train_timesteps: int, grid: Sequence[float]) -> Tensor:
    """[num_samples] timesteps in [0, T-1], before they are moved to the nearest time of the sampling grid."""
    last = num_train_timesteps - 1
    generator = torch.Generator("cpu").manual_seed(config.seed)
    if config.collector == "solver":
        times = torch.tensor(list(dict.fromkeys(grid)), dtype=torch.float64)  # some solvers repeat times
        turns = torch.arange(config.num_samples)
        few = config.num_samples < len(times)  # spread them over the whole grid
        return times[turns * len(times) // config.num_samples if few else turns % len(times)]
    if config.collector == "uniform":
        return torch.rand(config.num_samples, generator=generator, dtype=torch.float64) * last
    normal = torch.randn(config.num_samples, generator=generator, dtype=torch.float64)
    return ((normal * config.sigma + config.mu) * num_train_timesteps).clamp(0, last)


def collect(
    pipe: DiffusionPipeline,
    config: CalibrationConfig | None = None,
    output: str | Path | None = None,
    *,
    conditioning: dict | None = None,
    pipeline_kwargs: dict | None = None,
) -> CalibrationStore:
    """Calibrate: record tuples from the pipeline's own sampling, then measure every layer's input on them.

    Args:
        pipe: a diffusers pipeline in full precision.
        output: folder of the store; an unfinished one made with the same arguments is resumed. Without it the
            store is made in a temporary folder and only returned.
        conditioning, pipeline_kwargs: as in `sampling.sample`, e.g. {"prompt": [...]}.

    Raises:
        UserError: the folder holds another store, or a layer sees NaN or infinity.
    """
    config = config or CalibrationConfig()
    if output is None:
        with tempfile.TemporaryDirectory() as temporary:
            return collect(pipe, config, temporary, conditioning=conditioning, pipeline_kwargs=pipeline_kwargs)
    folder = Path(output)
    model = denoiser(pipe)
    with output_folder(folder):
        meta = _start(folder, model, config, pipe, conditioning, pipeline_kwargs)
        if not meta["complete"]:
            _record(folder, pipe, config, meta, conditioning, pipeline_kwargs)
            write_meta(folder, meta)
            _measure(folder, model, config, meta)
            write_meta(folder, {**meta, "complete": True})
    return CalibrationStore.load(folder)


def _start(
    folder: Path,
    model: nn.Module,
    config: CalibrationConfig,
    pipe: DiffusionPipeline,
    conditioning: dict | None,
    pipeline_kwargs: dict | None,
) -> dict:
    """The store's header: a new one, or that of the interrupted run that these arguments continue."""
    asked: dict[str, Any] = {
        "config": asdict(config),
        "dtype": str(model.dtype),
        "scheduler": {"class": type(pipe.scheduler).__name__, **_describe(dict(pipe.scheduler.config))},
        "conditioning": _describe(conditioning),
        "pipeline_kwargs": _describe(pipeline_kwargs),
        "fingerprint": fingerprint(model),
    }
    if not asked["fingerprint"] or any(is_quantized(module) for module in model.modules()):
        raise UserError("calibration needs a model with Linear or Conv2d layers, all in full precision.")
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
    return {
        **asked,
        "num_train_timesteps": int(pipe.scheduler.config.num_train_timesteps),
        "num_batches": -(-config.num_samples // config.batch_size),
        "shared": {},
        "complete": False,
    }


def _record(
    folder: Path,
    pipe: DiffusionPipeline,
    config: CalibrationConfig,
    meta: dict,
    conditioning: dict | None,
    pipeline_kwargs: dict | None,
) -> None:
    """Phase 1: one file per batch of trajectories; batches already there are kept. Fills in meta["shared"]."""
    grid = _sampling_grid(pipe.scheduler, config.num_inference_steps) if config.collector == "solver" else []
    timesteps = draw_timesteps(config, meta["num_train_timesteps"], grid)
    # From high t to low: trajectories that leave early share a batch, which then stops early.
    order = timesteps.argsort(descending=True, stable=True)
    for index, rows in enumerate(tqdm(order.split(config.batch_size), desc="collect", unit="batch")):
        if batch_path(folder, index).exists():
            continue
        calls = record_calls(
            pipe,
            [config.seed + int(i) for i in rows],
            timesteps[rows].tolist(),
            num_inference_steps=config.num_inference_steps,
            conditioning=conditioning,
            pipeline_kwargs=pipeline_kwargs,
        )
        meta["shared"] = calls.plain
        write_meta(folder, meta)
        save_calls(folder, index, calls)


def _sampling_grid(scheduler: SchedulerMixin, num_inference_steps: int) -> list[float]:
    """The times of the sampler, asked of a copy: the pipeline's own scheduler is not touched."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:  # flow-matching schedulers that shift by the picture's size
        raise UserError(f"collector 'solver' cannot know the grid of {type(scheduler).__name__} ({error}).") from None
    return scheduler.timesteps.tolist()


def _measure(folder: Path, model: nn.Module, config: CalibrationConfig, meta: dict) -> None:
    """Phase 2: replay the tuples bin by bin through the model and measure what each layer is fed."""
    calls = Calls.concatenate([load_calls(folder, i, meta["shared"]) for i in range(meta["num_batches"])])
    batches = list(binned_batches(calls, config.num_bins, meta["num_train_timesteps"], config.batch_size))
    layers = list(meta["fingerprint"])
    statistics, progress = InputStatistics(len(layers), config.num_bins), 0
    if (folder / "statistics.safetensors").exists():
        statistics, progress = load_statistics(folder)

    def keep(done: int) -> None:
        if done % SAVE_EVERY == 0 or done == len(batches):
            save_statistics(folder, statistics, done)

    update(statistics, model, layers, batches, progress, keep)


def _describe(value: Any) -> Any:
    """A JSON form of settings for comparing stores: tensors by shape and sum, other objects by their class."""
    if isinstance(value, dict):
        return {str(k): _describe(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), float(value.double().sum())]
    if isinstance(value, (list, tuple, range)):
        return [_describe(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
