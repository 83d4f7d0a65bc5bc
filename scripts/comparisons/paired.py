"""A model beside its full-precision original: same-seed images, noise predictions on held-out tuples, feature-FID."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ptq4dm.calibration.record import Calls, record_calls, replay
from ptq4dm.evaluation.extractors import load_extractor, load_reference_statistics
from ptq4dm.evaluation.frechet import Moments, frechet_distance
from ptq4dm.pipelines.denoiser import denoiser, denoiser_name
from ptq4dm.pipelines.images import to_uint8
from ptq4dm.pipelines.sampling import sample

HELD_OUT = 1_000_000  # first seed that calibration never uses


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
            self.images = torch.cat(list(self.sample(self.exact, self.seeds, self.steps)))

    def compare(self, model) -> tuple[dict, torch.Tensor]:
        """PSNR of same-seed images and relative squared error of predictions; (noise, signal) of each tuple."""
        images = torch.cat(list(self.sample(model, self.seeds, self.steps)))
        mse = (images - self.images).double().square().flatten(1).mean(1)
        psnr = -10 * mse.clamp_min(1e-12).log10()
        noise = (self.predict(model) - self.eps).double().square().flatten(1).sum(1)
        signal = self.eps.double().square().flatten(1).sum(1)
        figures = {
            "psnr": float(psnr.mean()),
            "psnr_stderr": float(psnr.std() / len(psnr) ** 0.5),
            "mse": float(mse.mean()),
            "eps_error": float(noise.sum() / signal.sum()),
        }
        return figures, torch.stack([noise, signal], 1)

    def predict(self, model) -> torch.Tensor:
        model.eval()
        parts = torch.arange(len(self.calls)).split(self.batch_size)
        return torch.cat([replay(model, self.calls[part]).cpu() for part in parts])

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
        extractor = load_extractor("feature-fid", denoiser(self.pipe).device)
        real = load_reference_statistics(extractor, None, self.batch_size).statistics
        moments = Moments(extractor.dim)
        for images in self.sample(model, range(count), steps):
            moments.update(extractor(to_uint8(images)))
        return frechet_distance(moments.mu, moments.sigma, real.mu, real.sigma)

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
        return Calls.concatenate(parts)
