"""From plans of narrow layers to plans of layers whose most important rows have 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from ..errors import UserError
from ..layers.plan import Int4Plan, LayerPlan
from ..layers.row_mix import RowMixPlan
from .importance import WIDE, RowTask, important_rows


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
    return {name: _mixed(plan, rows.get(name, []), outputs[name]) for name, plan in plans.items()}


def _mixed(plan: LayerPlan, wide: list[int], outputs: int) -> LayerPlan:
    """The plan of a layer of so many outputs, with these of 8 bits."""
    if not wide:
        return plan
    kept = {item.name: getattr(plan, item.name) for item in fields(LayerPlan)}
    if len(wide) == outputs:
        return LayerPlan(**{**kept, "format": "int8", "weight_bits": WIDE})
    return RowMixPlan(**{**kept, "format": "row-mix"}, wide=wide)
