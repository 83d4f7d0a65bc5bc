"""What calibration knows of one layer: the form in which rounders and range objectives get it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass
class LayerEvidence:
    """What one layer is fed. Its K inputs are in the order of its flattened weight [N, K].

    rows: [R, K] float32, a sample of the inputs: a row is a token of a Linear, or a window of a convolution.
    peak: [K] float32, the largest magnitude of each input over all rows, sampled or not; None where it was not taken.
    low: the smallest value of all inputs; None where it was not taken.
    """

    rows: Tensor
    peak: Tensor | None = None
    low: float | None = None

    @cached_property
    def hessian(self) -> Tensor:
        """X^T X [K, K] float64 of the rows X: half the second derivative of |X W^T - X Q^T|^2 in a row of Q."""
        return (self.rows.T @ self.rows).double()

    def columns(self, chosen: Tensor | slice) -> LayerEvidence:
        """Return the evidence of some of the inputs, or of all inputs in another order."""
        return LayerEvidence(self.rows[:, chosen], None if self.peak is None else self.peak[chosen], self.low)
