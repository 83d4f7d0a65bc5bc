"""What the parts of layers' inputs hold, and the plans of layers whose input is split where that pays.

    noise of an input   sum over channels of step^2 / 12: what rounding adds, each channel of the input counted alike

A seam is used where that sum falls by SAVED at least: between parts that are alike there is nothing to gain. The
share, and that channels count alike, are our assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evidence import LayerEvidence
from ..layers.plan import LayerPlan
from ..layers.split.choices import MOST, pads, parts_of
from ..layers.split.formats import split_plan
from ..layers.view import LayerView
from ..ranges.inputs import activation_grid
from ..ranges.registry import OBJECTIVES, objective_parameter
from .observe import Seams

SAVED = 0.05

Histogram = tuple[Tensor, float, float, float]  # counts, limit, low, high: see InputStatistics.merged
Grid = tuple[float, int]


@dataclass(frozen=True)
class PartedInput:
    """A layer's input: the seams, and the statistics of each part."""

    seams: Seams
    parts: tuple[Histogram, ...]


def split_where_it_pays(
    plan: LayerPlan, view: LayerView, found: PartedInput, symmetric: bool, evidence: LayerEvidence | None
) -> LayerPlan:
    """The plan of a layer with the seams of its input, and a grid for each part; as it is where they save too little.

    Arguments as in `split_at`.
    """
    sizes = _sizes(found, view)
    grids = _grids(plan, view, found, symmetric, evidence)
    whole, _ = part_grid(plan, together(found.parts), symmetric, evidence, view.weight.detach().float())
    noise = sum(size * scale**2 for size, (scale, _) in zip(sizes, grids, strict=True))
    if noise > (1 - SAVED) * sum(sizes) * whole**2:
        return plan
    return split_at(plan, view, found, symmetric, evidence, grids)


def split_at(
    plan: LayerPlan,
    view: LayerView,
    found: PartedInput,
    symmetric: bool,
    evidence: LayerEvidence | None,
    grids: list[Grid] | None = None,
) -> LayerPlan:
    """The plan of a layer with a grid for each part of its input, under the plan's objective.

    Where a convolution pads, parts have one zero point, that of the best grid of all parts scaled to one size; else
    each its own. Where the objective asks the model, parts get the grids of "mse", and it is their relation that is
    fixed here: whoever asks goes on to move all of them together.

    plan: with its width and its objective. evidence: what the objective looks at, or None. grids: those of the parts,
        where they are known.
    """
    sizes = _sizes(found, view)
    grids = grids or _grids(plan, view, found, symmetric, evidence)
    scale, zero = max(grids)
    factors = [min(scale / own, MOST) for own, _ in grids]
    if not pads(view.module):
        split = split_plan(plan, list(found.seams), factors, [own - zero for _, own in grids])
        split.input_scale, split.input_zero_point = scale, zero
        return split
    split = split_plan(plan, list(found.seams), factors, [0] * len(sizes))
    columns = torch.tensor(factors).repeat_interleave(torch.tensor(sizes) * _places(view)).to(view.weight)
    seen = None
    if evidence is not None and evidence.rows is not None:
        seen = LayerEvidence(evidence.rows * columns.to(evidence.rows))
    weight = view.weight.detach().float() / columns
    split.input_scale, split.input_zero_point = part_grid(
        plan, together(found.parts, factors), symmetric, seen, weight
    )  # fmt: skip
    return split


def together(
    parts: tuple[Histogram, ...], factors: list[float] | None = None, shifts: list[float] | None = None
) -> Histogram:
    """The statistics of all parts as of one input, each times its factor and shifted: exact ends, and bins that hold
    the centres of the parts' bins."""
    maps = list(zip(parts, factors or [1.0] * len(parts), shifts or [0.0] * len(parts), strict=True))
    limit = max(reach * factor + abs(shift) for (_, reach, _, _), factor, shift in maps)
    counts = torch.zeros_like(parts[0][0])
    n = len(counts)
    for (own, reach, _, _), factor, shift in maps:
        centres = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * reach / n) - reach
        places = ((centres * factor + shift + limit) * (n / 2 / limit)).floor().long().clamp(0, n - 1)
        counts.index_add_(0, places, own)
    low = min(low * factor + shift for (_, _, low, _), factor, shift in maps)
    high = max(high * factor + shift for (_, _, _, high), factor, shift in maps)
    return counts, limit, low, high


def mapped(found: PartedInput, plan: Any) -> Histogram:
    """The statistics of what a split layer rounds, under its plan, as of one input."""
    shifts = [offset * plan.input_scale for offset in plan.input_offsets]
    return together(found.parts, plan.input_factors, shifts)


def part_grid(
    plan: LayerPlan, part: Histogram, symmetric: bool, evidence: LayerEvidence | None, weight: Tensor
) -> Grid:
    """The grid of a part under the plan's objective; of one that asks the model, under "mse"."""
    histogram, limit, low, high = part
    objective, parameter = plan.objective, plan.objective_parameter
    if "model" in OBJECTIVES.find(objective).needs:
        objective, parameter, evidence = "mse", objective_parameter("mse"), None
    if low > high:  # a part without a channel, or never fed
        return 1.0, 0
    return activation_grid(
        histogram.to(weight.device), limit, low, high, plan.activation_bits, objective, parameter, symmetric,
        evidence, None if evidence is None else weight,
    )  # fmt: skip


def _grids(
    plan: LayerPlan, view: LayerView, found: PartedInput, symmetric: bool, evidence: LayerEvidence | None
) -> list[Grid]:
    """The grid of each part, by itself."""
    each, grids = _places(view), []
    for part, (start, end) in zip(found.parts, parts_of(found.seams, view.module.weight.shape[1]), strict=True):
        own = slice(start * each, end * each)
        seen = None if evidence is None or evidence.rows is None else evidence.columns(own)
        grids.append(part_grid(plan, part, symmetric, seen, view.weight.detach()[:, own].float()))
    return grids


def _sizes(found: PartedInput, view: LayerView) -> list[int]:
    return [end - start for start, end in parts_of(found.seams, view.module.weight.shape[1])]


def _places(view: LayerView) -> int:
    """Columns of the flattened weight for a channel: of a convolution as many as its kernel is large."""
    return view.weight.shape[1] // view.module.weight.shape[1]
