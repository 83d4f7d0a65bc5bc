"""OHQ: "On-Chip Hardware-Aware Quantization for Mixed Precision Neural Networks", Huang et al., arXiv:2309.01945.

1. Measure what each layer costs in each format on the device that will run it: `budgets/clocks.py`, `graphs.py`.
2. Measure how much the model's prediction depends on each layer, with a part of the layer's weights masked: no
   gradients, no quantized runs of the model, no images needed: `budgets/masking.py`.
3. Give each layer a format, by an integer program, within budgets of time and bytes: `budgets/exact.py`.

The abstract and notes on the paper were at hand, not its text: the share of masked weights, how formats enter, and
the constraints are ours, and each of those files says which. The paper measures clock cycles and power of an FPGA's
operators at 4 and 8 bits; here it is seconds of whole layers, in every format that this library has a kernel for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ..budgets.candidates import Candidate, Planned, least_bytes, packed, packing_of, planned, recipes_of
from ..budgets.exact import Allocation, allocate, out_of_reach
from ..budgets.measure import measured
from ..budgets.options import BudgetOptions
from ..budgets.table import Table
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.plan import LayerPlan
from ..layers.registry import needs_of
from ..layers.view import LayerView, find_layers
from ..options import option
from ..quantization.recipe import QuantConfig, register

CANDIDATES = (
    "rtn activations=dynamic",
    "rtn weight_bits=4 activations=dynamic",
    "rtn weight_bits=4 group_size=128 activations=dynamic",
    "rtn weight_bits=4 group_size=64 activations=dynamic",
)
ON_GPU = ("rtn format=fp8 activations=dynamic",)
OF_MASKS = ("share", "scale")


@dataclass
class Outcome:
    """What a recipe found: the table, the choice, and the candidates that it was made from."""

    table: Table
    allocation: Allocation
    candidates: list[Candidate] = field(default_factory=list)

    def plans(self, picks: Any) -> dict[str, LayerPlan]:
        """Layer -> plan of some picks of the table."""
        chosen: list[dict[str, LayerPlan]] = [{}, *(one.plans for one in self.candidates)]
        return {
            name: chosen[pick][name]
            for name, pick in zip(self.table.layers, map(int, picks), strict=True)
            if name in chosen[pick]
        }


@register("ohq")
@dataclass(repr=False)
class OHQConfig(BudgetOptions, QuantConfig):
    """OHQ. Options: BudgetOptions and those of every method.

    Without candidates named: round to nearest in 8 bits, in 4 bits with one scale an output, with one for 128 and for
    64 inputs, dynamic inputs; on a GPU also fp8. `outcome` is what was found, once the recipe was resolved.
    """

    packs_while_loading: ClassVar[bool] = False
    candidates: tuple[str, ...] = option((), "recipes, each 'method option=value ...'; of 8 and 4 bits otherwise")

    def __post_init__(self) -> None:
        super().__post_init__()
        BudgetOptions.check(self)
        idle = [name for name in OF_MASKS if getattr(self, name) != getattr(type(self), name)]
        if self.plan is None and self.sensitivity == "direct" and idle:
            raise UserError(
                f"sensitivity='direct' masks no weights, so that {' and '.join(idle)} would change nothing; leave "
                f"{'them' if idle[1:] else 'it'} out, or take sensitivity='masked'."
            )
        self._outcome: Outcome | None = None  # no choice, so no field
        self._packing: dict[str, Any] = {}
        if self.candidates:
            recipes_of(self.candidates)
        if self.plan is None and self.costs and os.path.exists(self.costs) and not os.path.isdir(self.costs):
            raise UserError(f"costs is a folder of measured times, and {self.costs} is a file; give another name.")

    @property
    def outcome(self) -> Outcome:
        """What was found. Raises UserError before the recipe was resolved, and of a plan that was followed."""
        return self.resolved(self._outcome)

    @property
    def needs_calibration(self) -> bool:
        """Always, but to follow a plan whose formats look at nothing: calls of the model are timed."""
        if self.plan is not None:
            return any(needs_of(choice) for choice in self.plan.layers.values()) or super().needs_calibration
        return True

    def resolve(
        self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None
    ) -> dict[str, LayerPlan]:
        """The plan of least predicted error within the budgets."""
        if store is None:
            raise UserError("OHQConfig times calls of the model: pass a store from ptq4dm.collect(pipe).")
        plans = planned(model, self._recipes(model), store, self.modules_to_not_convert)
        self._check_bytes(model, views, plans)
        self._packing = packing_of(plans)
        candidates = packed(model, plans, store)
        table = measured(model, views, candidates, store.recorded(), self)
        self._outcome = found = Outcome(table, allocate(table, self.latency, self.bytes, self.efficiency), candidates)
        return found.plans(found.allocation.picks)

    def check_reach(self, model: nn.Module) -> None:
        """Raises UserError where the budget of bytes is out of reach, if candidates need no calibration."""
        recipes = {} if self.plan is not None else self._recipes(model)
        if recipes and not any(recipe.needs_calibration for recipe in recipes.values()):
            views = find_layers(model, self.modules_to_not_convert)
            self._check_bytes(model, views, planned(model, recipes, None, self.modules_to_not_convert))

    def _recipes(self, model: nn.Module) -> dict[str, QuantConfig]:
        return recipes_of(self.candidates or CANDIDATES + (ON_GPU if _on_gpu(model) else ()))

    def _check_bytes(self, model: nn.Module, views: list[LayerView], plans: list[Planned]) -> None:
        if self.bytes is not None and self.bytes < (least := least_bytes(model, views, plans)):
            raise UserError(f"{out_of_reach(f'bytes {self.bytes:g}', f'bytes {least:.4f}')}.")

    def packing_options(self) -> dict[str, Any]:
        """What the candidates look at."""
        return self._packing


def _on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"
