"""feature-FID of pictures as they are made: the embedded network, against CIFAR-10's training set."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .extractors import load_extractor, load_reference_statistics
from .frechet import frechet_distance


class FeatureFID:
    """Measures any number of models with one network and one reference, both read once.

        measure = FeatureFID("cuda")
        measure(batches)      # float images [B, 3, 32, 32] in [0, 1], or uint8, 2 or more in all -> feature-FID

    Raises:
        UserError: the embedded files are missing; on a call, images of another size or too few, or NaN among them.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.extractor = load_extractor("feature-fid", device)
        self.reference = load_reference_statistics(self.extractor, None, batch_size=1).statistics

    def __call__(self, batches: Iterable[Tensor]) -> float:
        moments = self.extractor.moments(batches)
        return frechet_distance(moments.mu, moments.sigma, self.reference.mu, self.reference.sigma)
