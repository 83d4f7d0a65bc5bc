"""Allocation by importance: the rows of weights that matter most get 8 bits, at a fixed average width.

"Gradient-Based Post-Training Quantization: Challenging the Status Quo", Yvinec et al., arXiv:2308.07662, has such an
allocation; the rule here is our assumption, as the scores are (importance.py). A row of K weights costs
(8 - narrow) K bits, so rows are taken by score over K, the largest first, until the next one would cost too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..layers.plan import Int4Plan, LayerPlan
from ..layers.row_mix import RowMixPlan
from .importance import IMPORTANCE, RowTask

WIDE = 8


def with_wide_rows(
    plans: Mapping[str, LayerPlan], task: RowTask, importance: str, average_bits: float
) -> dict[str, LayerPlan]:
    """Plans by layer in which rows of "int4" layers have 8 bits, so that the mean width of these layers' weights is
    `average_bits`. Layers of one width stay "int4", or are "int8".

    task: what the score is asked for, with the views of all layers. importance: a name in IMPORTANCE.
    Rows of grouped convolutions all stay narrow, and are counted.

    Raises UserError where no layer is narrow, or where one has groups of scales or zero points.
    """
    narrow = [view for view in task.views if isinstance(plans.get(view.name), Int4Plan)]
    if not narrow:
        raise UserError("average_bits has no layer to choose rows from: none of the plan has weights of 4 bits.")
    if any(plans[view.name].group_size or plans[view.name].affine for view in narrow):  # type: ignore[attr-defined]
        raise UserError("rows of 8 bits are for layers with one scale an output, without zero points.")
    candidates = [view for view in narrow if getattr(view.module, "groups", 1) == 1]
    weights = sum(view.weight.numel() for view in narrow)
    rows = important_rows(replace(task, views=candidates), importance, average_bits, weights)
    outputs = {view.name: len(view.weight) for view in task.views}
    return {name: mixed_plan(plan, rows.get(name, []), outputs[name]) for name, plan in plans.items()}


def important_rows(
    task: RowTask, importance: str, average_bits: float, weights: int | None = None
) -> dict[str, list[int]]:
    """Layer -> numbers of its rows that get 8 bits, rising; of every layer of the task.

    average_bits: the mean width of the weights is at most this, and a row less than it at least.
    weights: over how many the mean is taken, those of the task and others of its narrow width; the task's if None.

    Raises UserError where a score is NaN or infinite.
    """
    scores = IMPORTANCE.find(importance)(task)
    if not all(score.isfinite().all() for score in scores.values()):
        raise UserError(
            "the importance of rows is NaN or infinite: the model gives no finite numbers on calibration."
        )
    return chosen_rows(
        scores, {view.name: view.weight.shape[1] for view in task.views}, task.bits, average_bits, weights
    )


def chosen_rows(
    scores: dict[str, Tensor], inputs: dict[str, int], bits: int, average_bits: float, weights: int | None = None
) -> dict[str, list[int]]:
    """The same from scores [N] of rows of so many inputs each. Rows of one score are taken in the layers' order."""
    costs = torch.cat([torch.full((len(score),), inputs[name]) for name, score in scores.items()])
    values = torch.cat([score.double().cpu() / inputs[name] for name, score in scores.items()])
    room = (average_bits - bits) / (WIDE - bits) * (int(costs.sum()) if weights is None else weights)
    order = values.argsort(descending=True, stable=True)
    taken = torch.zeros(len(values), dtype=torch.bool)
    taken[order[costs[order].cumsum(0) <= room]] = True
    parts = taken.split([len(score) for score in scores.values()])
    return {name: part.nonzero()[:, 0].tolist() for name, part in zip(scores, parts, strict=True)}


def mixed_plan(plan: LayerPlan, wide: list[int], outputs: int) -> LayerPlan:
    """The plan of a layer of so many outputs, with these of 8 bits."""
    if not wide:
        return plan
    kept = {item.name: getattr(plan, item.name) for item in fields(LayerPlan)}
    if len(wide) == outputs:
        return LayerPlan(**{**kept, "format": "int8", "weight_bits": WIDE})
    groups = {name: getattr(plan, name) for name in ("group_size", "affine") if hasattr(plan, name)}
    return RowMixPlan(**{**kept, "format": "row-mix"}, **groups, wide=wide)
