"""Subspace gradient of ZOODiP (arXiv:2503.14868, section 3.3): where an embedding hardly moved is noise.

    B      the last tau embeddings [tau, d]
    X      B, each column less its mean and divided by its standard deviation
    X = U S V'   the principal axes V of X, with variances S^2
    P      the rows of V' after the least number of axes that hold more than 1 - nu of the variance
    g <- g - (g P') P

The axes are those of standardised columns and the gradient is not standardised: so have it paper and code. What is
outside the span of the buffer stays: P has fewer than tau of d directions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise_axes(embeddings: Tensor, variance: float) -> Tensor:
    """Orthonormal axes [r, d] of the last `variance` of the variance of embeddings [tau, d]; computed in float64.

    Axes without any variance, of which the mean alone makes one, are no axes of the data: they are left out (our
    assumption; a library may give any direction for them).
    """
    rows = embeddings.double()
    rows = rows - rows.mean(0)
    spread = rows.square().mean(0).sqrt()
    rows = rows / torch.where(spread > 0, spread, torch.ones_like(spread))
    energy, left = torch.linalg.eigh(rows @ rows.T)  # [tau], rising; of tau x tau, for tau is less than d
    energy, left = energy.flip(0).clamp_min(0), left.flip(1)
    known = energy > energy[0] * 1e-12
    energy, left = energy[known], left[:, known]
    if not len(energy):
        return embeddings.new_zeros(0, embeddings.shape[1])
    shares = energy.cumsum(0) / energy.sum()
    kept = int((shares <= 1 - variance).sum()) + 1  # least number of axes that hold more
    axes = (left[:, kept:].T @ rows) / energy[kept:, None].sqrt()
    return axes.to(embeddings.dtype)


def without(gradient: Tensor, axes: Tensor) -> Tensor:
    """A gradient [d] less its components along orthonormal axes [r, d]."""
    return gradient - (gradient @ axes.T) @ axes
