"""What calibration knows of one layer, as rounders and range objectives get it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass
class LayerEvidence:
    """What one layer is fed, with K inputs in the order of its flattened weight [N, K].

    rows: [R, K] float32, a sample of its inputs as rows: tokens of a Linear, windows of a convolution.
    peak: [K] float32, the largest magnitude of all inputs, sampled or not; None where nobody looked.
    low: the least input of all; None where nobody looked.
    """

    rows: Tensor
    peak: Tensor | None = None
    low: float | None = None

    @cached_property
    def hessian(self) -> Tensor:
        """X^T X [K, K] float64: half the second derivative of |X W^T - X Q^T|^2 in a row of Q."""
        return (self.rows.T @ self.rows).double()

    def columns(self, chosen: Tensor | slice) -> LayerEvidence:
        """The evidence of some inputs, or of all in another order."""
        return LayerEvidence(self.rows[:, chosen], None if self.peak is None else self.peak[chosen], self.low)
