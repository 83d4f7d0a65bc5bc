"""Smoothing: divisors s [K] that move outliers from activations to weights, x / s and W diag(s).

s_j = max|X_j|^alpha / max|W_j|^beta        (SVDQuant section 4.1; the candidates are its code's)
"""

from __future__ import annotations

import torch
from torch import Tensor


def divisors(input_peak: Tensor, weight_peak: Tensor, alpha: float, beta: float) -> Tensor:
    """s [K] float32 from the largest magnitudes [K]; 1 for channels that are never fed or have no weight."""
    s = input_peak.pow(alpha) / weight_peak.pow(beta)
    usable = s.isfinite() & (s > 0) & (input_peak > 0) & (weight_peak > 0)
    return torch.where(usable, s, 1.0).clamp(1e-4, 1e4)  # what float16 holds


def candidates(steps: int) -> list[tuple[float, float]]:
    """(alpha, beta): none; then alpha = i / steps with beta 0 and with beta = 1 - alpha."""
    shares = [i / steps for i in range(1, steps)]
    return [(0.0, 0.0), *((a, 0.0) for a in shares), *((a, 1 - a) for a in shares)]
