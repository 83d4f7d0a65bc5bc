"""Range objectives that look at the values alone: an objective scores clipping, the search is over fractions.

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
from ..evidence import LayerEvidence
from ..kernels.formats.exact import over
from .inputs import InputValues
from .registry import positive, register_objective
from .search import TIE, least_of, ranges_of
from .weights import WeightRows

ACTIVATION_STEPS = 48  # grid points of the search for each end of the range
CHUNK = 2**16  # values that are scored at a time: what a core's own cache holds
QUANTILE_SIZE = 2**23  # older torch.quantile takes no more than 2^24 values at once


@register_objective("max")
class Max:
    """The whole range."""

    @staticmethod
    def weight(rows: WeightRows, parameter: None, evidence: LayerEvidence | None) -> Tensor:
        return rows.full

    @staticmethod
    def input(inputs: InputValues, parameter: None, evidence: LayerEvidence | None) -> tuple[float, int]:
        return inputs.grid(inputs.low, inputs.high)


@register_objective("percentile", parameter=99.99)
class Percentile:
    """The range that holds a share of the values; of inputs, half of what is left out lies on either side."""

    @staticmethod
    def check(value: float) -> float:
        if not 50 < value <= 100:
            raise UserError(f"a percentile lies in (50, 100]; got {value}.")
        return value

    @staticmethod
    def weight(rows: WeightRows, parameter: float, evidence: LayerEvidence | None) -> Tensor:
        magnitudes = rows.rows.abs()
        parts = magnitudes.split(max(1, QUANTILE_SIZE // magnitudes.shape[1]))
        reach = torch.cat([part.double().quantile(parameter / 100, dim=1) for part in parts]).float()
        best = rows.full * (reach / magnitudes.amax(1)).nan_to_num_(1.0) if rows.affine else over(reach, rows.limit)
        return torch.where(best > 0, best, rows.full)  # a row of little but zeros keeps what it has

    @staticmethod
    def input(inputs: InputValues, parameter: float, evidence: LayerEvidence | None) -> tuple[float, int]:
        centres, counts = inputs.values
        cumulative = counts.cumsum(0) / counts.sum()
        tail = (100 - parameter) / 200
        inside = (cumulative >= tail) & (cumulative - counts / counts.sum() <= 1 - tail)
        return inputs.grid(float(centres[inside].min()), float(centres[inside].max()))


@register_objective("lp", parameter=2.4)
class Lp:
    """The least mean of |x - Q(x)|^p."""

    @staticmethod
    def check(value: float) -> float:
        return positive(value, "the exponent of objective 'lp'")

    @staticmethod
    def weight(rows: WeightRows, parameter: float, evidence: LayerEvidence | None) -> Tensor:
        def error(scale: Tensor) -> Tensor:
            return rows.errors(scale).double().abs_().pow_(parameter).sum(1) * scale.double().pow(parameter)

        return least_of(rows, error)

    @staticmethod
    def input(inputs: InputValues, parameter: float, evidence: LayerEvidence | None) -> tuple[float, int]:
        """Both ends of the range on a grid of fractions (one fraction for both if symmetric): PTQ4DM's search."""
        centres, counts = inputs.values
        shares = counts / counts.sum()
        scales, zeros = inputs.grids(*ranges_of(inputs, ACTIVATION_STEPS))
        scale, zero = (part.to(centres.device)[:, None] for part in (scales, zeros))
        limit = 2 ** (inputs.bits - 1)
        errors = []
        rows = max(1, CHUNK // len(centres))
        for s, z in zip(scale.split(rows), zero.split(rows), strict=True):
            codes = ((centres / s).round_() + z).clamp_(-limit, limit - 1) - z
            errors.append((centres - codes * s).abs_().pow_(parameter) @ shares)
        found = torch.cat(errors)
        best = int((found <= found.min() * TIE).nonzero()[0])
        return float(scales[best]), int(zeros[best])


@register_objective("mse", parameter=2.0)
class Mse(Lp):
    """The least mean of (x - Q(x))^2: lp with an exponent that nobody sets."""

    check = staticmethod(lambda value: 2.0)
