"""Range objectives: how far a grid should reach when the largest value need not be on it.

An objective scores clipping; the search is over fractions of the full range:

    max         no clipping
    percentile  the range that holds that share of the values (default 99.99 %)
    mse         argmin_c  E |x - Q_c(x)|^2
    lp          argmin_c  E |x - Q_c(x)|^p, p = 2.4: PTQ4DM (CVPR 2023), the metric of its released code

Activations are scored on a histogram, weights row by row on their values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.formats.int8 import affine_parameters, weight_limit

OBJECTIVES = {"max": None, "percentile": 99.99, "mse": 2.0, "lp": 2.4}
"""name -> the default of its parameter (percent, or the exponent)."""

ACTIVATION_STEPS = 48  # grid points of the search for each end of the range
WEIGHT_STEPS = 50  # from half the range to the whole
QUANTILE_SIZE = 2**23  # older torch.quantile takes no more than 2^24 values at once


def objective_parameter(objective: str, value: float | None = None) -> float | None:
    """The objective's parameter, checked; None stands for the default."""
    if objective not in OBJECTIVES:
        raise UserError(f"objective '{objective}' is unknown; choose from {', '.join(OBJECTIVES)}.")
    if value is None or objective in ("max", "mse"):
        return OBJECTIVES[objective]
    if objective == "percentile" and not 50 < value <= 100:
        raise UserError(f"a percentile lies in (50, 100]; got {value}.")
    if not 0 < value < float("inf"):
        raise UserError(f"the exponent of objective 'lp' is positive and finite; got {value}.")
    return float(value)


def weight_scale(weight: Tensor, bits: int, objective: str = "max", parameter: float | None = None) -> Tensor:
    """Scales [N] float32 of symmetric per-channel codes for weight [N, ...] float; a zero row gets scale 1."""
    rows = weight.flatten(1).float()
    limit = weight_limit(bits)
    parameter = objective_parameter(objective, parameter)
    full = rows.abs().amax(1) / limit
    if objective == "max":
        best = full
    elif objective == "percentile":
        parts = rows.abs().split(max(1, QUANTILE_SIZE // rows.shape[1]))
        best = torch.cat([part.quantile(parameter / 100, dim=1) for part in parts]) / limit
        best = torch.where(best > 0, best, full)  # a row of little but zeros keeps what it has
    else:
        best, least = full.clone(), torch.full_like(full, float("inf"))
        for step in range(WEIGHT_STEPS, 2 * WEIGHT_STEPS + 1):
            scale = full * (step / (2 * WEIGHT_STEPS))
            steps = rows / torch.where(scale > 0, scale, 1.0)[:, None]
            error = (steps - steps.round().clamp_(-limit, limit)).abs_().pow_(parameter).sum(1)
            error = error * scale.pow(parameter)
            better = error <= least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return torch.where(best < torch.finfo(torch.float32).tiny, 1.0, best)


def activation_grid(
    histogram: Tensor,
    limit: float,
    low: float,
    high: float,
    bits: int,
    objective: str = "max",
    parameter: float | None = None,
    symmetric: bool = False,
) -> tuple[float, int]:
    """The scale and zero point of a static activation grid.

    Args:
        histogram: [n] counts of values in n equal bins over [-limit, limit].
        low, high: the exact extremes.
    """
    parameter = objective_parameter(objective, parameter)
    low, high = min(low, 0.0), max(high, 0.0)
    if objective == "max" or low == high:
        return affine_parameters(low, high, bits, symmetric)
    counts = histogram.double()
    n = len(counts)
    centres = (torch.arange(n, dtype=torch.float64, device=counts.device) + 0.5) * (2 * limit / n) - limit
    used = counts > 0
    centres, counts = centres[used].clamp_(low, high), counts[used]
    if objective == "percentile":
        return affine_parameters(*_percentile_range(centres, counts, parameter), bits, symmetric)
    return _search(centres, counts / counts.sum(), low, high, bits, parameter, symmetric)


def _percentile_range(centres: Tensor, counts: Tensor, percent: float) -> tuple[float, float]:
    """The shares (100 - percent)/2 are cut off at either end."""
    cumulative = counts.cumsum(0) / counts.sum()
    tail = (100 - percent) / 200
    inside = (cumulative >= tail) & (cumulative - counts / counts.sum() <= 1 - tail)
    return float(centres[inside].min()), float(centres[inside].max())


def _search(centres, shares, low, high, bits, exponent, symmetric) -> tuple[float, int]:
    """PTQ4DM's search: both ends of the range on a grid of fractions (one fraction for both if symmetric)."""
    fractions = torch.arange(1, ACTIVATION_STEPS + 1, dtype=torch.float64) / ACTIVATION_STEPS
    lows = fractions if low < 0 and not symmetric else fractions[-1:]
    highs = fractions if high > 0 or symmetric else fractions[-1:]
    bound = max(-low, high)
    ends = [(-bound * b, bound * b) if symmetric else (low * a, high * b) for a in lows for b in highs]
    grids = [affine_parameters(float(a), float(b), bits, symmetric) for a, b in ends]
    scale, zero = torch.tensor(grids, dtype=torch.float64, device=centres.device).T[:, :, None]
    limit = 2 ** (bits - 1)
    errors = []
    for s, z in zip(scale.split(256), zero.split(256), strict=True):
        codes = ((centres / s).round_() + z).clamp_(-limit, limit - 1) - z
        errors.append((centres - codes * s).abs_().pow_(exponent) @ shares)
    return grids[int(torch.cat(errors).argmin())]
