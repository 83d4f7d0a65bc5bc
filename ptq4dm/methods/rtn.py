"""Round to nearest, the baseline: every range reaches to the largest value."""

from __future__ import annotations

from dataclasses import dataclass

from ..layers.plan import LayerPlan
from ..layers.view import LayerView
from ..quantization.recipe import register
from .eight_bit import IntegerConfig


@register("rtn")
@dataclass(repr=False)
class RTNConfig(IntegerConfig):
    """Round-to-nearest with maximum ranges. Options: IntegerConfig."""

    def resolve(self, model, views: list[LayerView], store) -> dict[str, LayerPlan]:
        plans = {view.name: self.layer_plan(view, store, "max", None) for view in views}
        return {name: plan for name, plan in plans.items() if plan is not None}
