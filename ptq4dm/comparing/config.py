"""What models are compared by, and with how much."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from ..checks import check_fields, check_seeds, named_options
from ..errors import UserError
from ..evaluation.extractors import METRICS
from ..evaluation.options import SampledOptions
from ..options import option
from ..pipelines.sampling import MOST_BATCH, check_arguments

MOST_IMAGES = 100_000


@named_options
@dataclass
class CompareConfig(SampledOptions):
    """What to compare, and with how much; all models alike.

    num_images: seeds seed .. seed + num_images - 1, of which the first num_shown are on the picture and the page.
    num_heldout: recorded denoiser inputs for the epsilon error, seeds from heldout_seed; 0 leaves it out.
    metric: the Frechet distance of the same images; see `EvaluateConfig`.
    timed_steps: denoiser calls timed per model, in turns with full precision, after warmup_steps; 0 leaves it out.
    The others, all given by name: `SampledOptions`, and `MeasureOptions` for networks that pictures are judged by.
    """

    num_images: int = option(8, "same-seed images of each model", low=1, high=MOST_IMAGES)
    num_shown: int = option(16, "of these on the picture and the page, at most", low=1, high=1000)
    _: KW_ONLY
    batch_size: int = option(16, "images at once", low=1, high=MOST_BATCH)
    num_heldout: int = option(32, "recorded calls for the epsilon error", low=0, high=MOST_IMAGES)
    metric: str = option("none", "Frechet distance of the images", choices=METRICS)
    timed_steps: int = option(10, "calls timed per model, in turns with full precision", low=0, high=1_000_000)

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
