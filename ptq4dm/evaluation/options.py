"""The options that `evaluate` and `compare` have alike: how pictures are sampled, and what measures them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..options import option
from ..pipelines.sampling import MOST_STEPS
from .inception import MODES
from .measures import MeasureOptions


@dataclass(kw_only=True)
class SampledOptions(MeasureOptions):
    """How pictures and recorded calls are sampled, and what they are measured against; given by name.

    seed, heldout_seed: of the first picture, and of the first recorded call for the epsilon error, whose figures are
        in num_bins bins of timesteps.
    reference: folder of images or npz; None is the embedded statistics (feature-fid only).
    inception_weights, resize: see `load_inception`; for "fid" only.
    warmup_steps: denoiser calls before those that are timed.
    conditioning, pipeline_kwargs: see `sample`.
    """

    num_inference_steps: int = option(50, low=1, high=MOST_STEPS)
    seed: int = option(0, "seed of the first image", low=0)
    heldout_seed: int = option(1_000_000, low=0)
    num_bins: int = option(10, low=1, high=10_000)
    reference: str | os.PathLike | None = option(None, "folder of real images, or npz of their mu and sigma")
    inception_weights: str | os.PathLike | None = option(None, "file, for --metric fid; downloaded otherwise")
    resize: str = option("torch-fidelity", "how --metric fid resizes images", choices=tuple(MODES))
    warmup_steps: int = option(2, low=0, high=1_000_000)
    conditioning: dict[str, Any] | None = None
    pipeline_kwargs: dict[str, Any] | None = None
