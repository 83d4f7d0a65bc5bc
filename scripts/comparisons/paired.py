"""Many models beside one full-precision original, whose images and noise predictions are made once.

The figures themselves are those of `ptq4dm evaluate`: ptq4dm/evaluation/paired.py and feature_fid.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ptq4dm.calibration.calls import Calls
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.sampled import record_calls
from ptq4dm.evaluation.feature_fid import FeatureFID
from ptq4dm.evaluation.paired import EpsilonError, image_errors, paired_psnr
from ptq4dm.pipelines.denoiser import denoiser, denoiser_name
from ptq4dm.pipelines.sampling import sample

HELD_OUT = 1_000_000  # first seed that calibration never uses
NUM_BINS = 10  # equal parts of the timesteps


@dataclass
class Paired:
    """The truth of a pipeline, made once: images of `count` held-out seeds and predictions at `timesteps`."""

    pipe: object
    count: int
    timesteps: Sequence[float]  # one for each held-out tuple
    steps: int
    batch_size: int
    exact: torch.nn.Module = field(init=False)

    def __post_init__(self):
        self.exact = denoiser(self.pipe).eval()
        self.seeds = range(HELD_OUT, HELD_OUT + self.count)
        self.calls = self._held_out()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the truth is float32; elsewhere TF32 is on
            self.eps = self.predict(self.exact)

    @cached_property
    def images(self) -> torch.Tensor:
        """The images of full precision, made when they are first asked for."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat(list(self.sample(self.exact, self.seeds, self.steps)))

    def compare(self, model) -> dict:
        """psnr (dB), psnr_stderr, psnr_interval, mse of the images; eps_error of the predictions, and
        eps_error_bins by NUM_BINS parts of the timesteps (None where no tuple lies)."""
        images = torch.cat(list(self.sample(model, self.seeds, self.steps)))
        pictures = paired_psnr(image_errors(images, self.images))
        return {
            "psnr": pictures["psnr_db"],
            "psnr_stderr": pictures["psnr_stderr"],
            "psnr_interval": pictures["psnr_interval"],
            "mse": pictures["mse"],
            **self.predicted(model),
        }

    def predicted(self, model) -> dict:
        """eps_error and eps_error_bins, as `compare` has them, without any image."""
        error = self.error(model, self.calls, self.eps)
        return {
            "eps_error": error.result()["overall"],
            "eps_error_bins": [float(noise / signal) if signal else None for noise, signal, _ in error.sums],
        }

    def error(self, model, calls: Calls, exact: torch.Tensor) -> EpsilonError:
        """The error of a model's predictions on calls for which full precision has `exact`."""
        error = EpsilonError(NUM_BINS, self.pipe.scheduler.config.num_train_timesteps)
        error.add(calls.time, self.predict(model, calls), exact)
        return error

    def predict(self, model, calls: Calls | None = None) -> torch.Tensor:
        """The model's predictions on calls, by default the held-out ones, on the CPU."""
        model.eval()
        calls = self.calls if calls is None else calls
        parts = torch.arange(len(calls)).split(self.batch_size)
        return torch.cat([replay(model, calls[part]).cpu() for part in parts])

    def sample(self, model, seeds: Sequence[int], steps: int) -> Iterator[torch.Tensor]:
        """Batches of images [B, 3, H, W] in [0, 1] of the pipeline with another model put in."""
        setattr(self.pipe, denoiser_name(self.pipe), model)
        try:
            for start in range(0, len(seeds), self.batch_size):
                yield sample(self.pipe, list(seeds[start : start + self.batch_size]), num_inference_steps=steps)
        finally:
            setattr(self.pipe, denoiser_name(self.pipe), self.exact)

    def feature_fid(self, model, count: int, steps: int) -> float:
        """Of `count` images, seeds from 0."""
        return self.feature_distance(self.sample(model, range(count), steps))

    @cached_property
    def feature_distance(self) -> FeatureFID:
        return FeatureFID(denoiser(self.pipe).device)

    def _held_out(self) -> Calls:
        parts = [
            record_calls(
                self.pipe,
                [HELD_OUT + 500_000 + int(i) for i in part],
                [self.timesteps[i] for i in part],
                num_inference_steps=self.steps,
            )
            for part in torch.arange(self.count).split(self.batch_size)
        ]
        return Calls.together(parts)


def held_out(pipe, count: int, steps: int, batch_size: int) -> Paired:
    """The truth of a pipeline on `count` held-out seeds, whose tuples are spread evenly over the sampling grid."""
    pipe.scheduler.set_timesteps(steps)
    grid = pipe.scheduler.timesteps.tolist()
    return Paired(pipe, count, [grid[i * len(grid) // count % len(grid)] for i in range(count)], steps, batch_size)
