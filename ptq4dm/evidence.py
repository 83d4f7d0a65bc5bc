"""What calibration knows of one layer: the form in which rounders and range objectives get it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import Tensor


@dataclass
class LayerEvidence:
    """What one layer is fed. Its K inputs are in the order of its flattened weight [N, K].

    rows: [R, K] float32, a sample of the inputs: a row is a token of a Linear, or a window of a convolution.
    peak: [K] float32, the largest magnitude of each input over all rows, sampled or not; None where it was not taken.
    low: the smallest value of all inputs; None where it was not taken.
    prediction: (scale, zero point) -> how far the model's prediction is off with the layer's input on that grid; None
        where nobody asked for it. Where it is there, it is all that there is: rows are None.
    """

    rows: Tensor | None
    peak: Tensor | None = None
    low: float | None = None
    prediction: Callable[[float, int], float] | None = None

    @cached_property
    def hessian(self) -> Tensor:
        """X^T X [K, K] float64 of the rows X: half the second derivative of |X W^T - X Q^T|^2 in a row of Q."""
        rows = cast(Tensor, self.rows)  # who asks for it has said that it needs rows
        return (rows.T @ rows).double()

    def columns(self, chosen: Tensor | slice) -> LayerEvidence:
        """Return the evidence of some of the inputs, or of all inputs in another order."""
        rows = cast(Tensor, self.rows)
        return LayerEvidence(rows[:, chosen], None if self.peak is None else self.peak[chosen], self.low)
