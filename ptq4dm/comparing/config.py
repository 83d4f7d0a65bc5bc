"""What models are compared by, and with how much."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..checks import check_fields, check_seeds, named_options
from ..errors import UserError
from ..evaluation.extractors import METRICS
from ..evaluation.inception import MODES
from ..evaluation.measures import MeasureOptions
from ..options import option
from ..pipelines.sampling import MOST_BATCH, MOST_STEPS, check_arguments

MOST_IMAGES = 100_000


@named_options
@dataclass
class CompareConfig(MeasureOptions):
    """What to compare, and with how much; all models alike.

    num_images: seeds seed .. seed + num_images - 1, of which the first num_shown are on the picture and the page.
    num_heldout: recorded denoiser inputs for the epsilon error, seeds from heldout_seed; 0 leaves it out.
    metric, reference, inception_weights, resize: the Frechet distance of the same images; see `EvaluateConfig`.
    timed_steps: denoiser calls timed per model, in turns with full precision, after warmup_steps; 0 leaves it out.
    conditioning, pipeline_kwargs: see `sample`.
    lpips_weights, clip, image_reward: see `MeasureOptions`.
    """

    num_images: int = option(8, "same-seed images of each model", low=1, high=MOST_IMAGES)
    num_shown: int = option(16, "of these on the picture and the page, at most", low=1, high=1000)
    num_inference_steps: int = option(50, low=1, high=MOST_STEPS)
    batch_size: int = option(16, "images at once", low=1, high=MOST_BATCH)
    seed: int = option(0, "seed of the first image", low=0)
    num_heldout: int = option(32, "recorded calls for the epsilon error", low=0, high=MOST_IMAGES)
    heldout_seed: int = option(1_000_000, low=0)
    num_bins: int = option(10, low=1, high=10_000)
    metric: str = option("none", "Frechet distance of the images", choices=METRICS)
    reference: str | os.PathLike | None = option(None, "folder of real images, or npz of their mu and sigma")
    inception_weights: str | os.PathLike | None = option(None, "file, for --metric fid; downloaded otherwise")
    resize: str = option("torch-fidelity", "how --metric fid resizes images", choices=tuple(MODES))
    warmup_steps: int = option(2, low=0, high=1_000_000)
    timed_steps: int = option(10, "calls timed per model, in turns with full precision", low=0, high=1_000_000)
    conditioning: dict[str, Any] | None = None
    pipeline_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "CompareConfig")
        check_seeds(self.seed, self.num_images)
        check_seeds(self.heldout_seed, max(self.num_heldout, self.batch_size, 2), "heldout_seed")

    def check(self) -> None:
        """Raises UserError for figures that measure nothing, and fields that were set to what they cannot be."""
        self.__post_init__()
        check_arguments(self.conditioning, self.pipeline_kwargs)
        if self.metric != "none" and self.num_images < 2:
            raise UserError("one image cannot give a Frechet distance; ask for 2 or more, or metric 'none'.")

    @property
    def seeds(self) -> range:
        """The seeds of all images."""
        return range(self.seed, self.seed + self.num_images)
