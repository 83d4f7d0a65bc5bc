"""MixLLM: "MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System
Design", Zheng et al., arXiv 2412.14590.

1. Every output row of every layer gets a score: what rounding it to 4 bits does to the model, on calibration tuples,
   at nearest codes without clipping (`allocation/importance.py`).
2. All rows of all layers are sorted together. A tenth, `rows`, gets 8 bits, symmetric in groups of 128; the others
   get 4 bits with zero points, in groups of 128: `allocation/salient_rows.py`, `layers/row_mix.py`. Inputs get 8 bits
   by token. Layers that do not divide into groups have one scale a row.
3. Each set of rows is clipped by the error of the layer's output, and rounded by its Hessian.
4. On a GPU rows of both widths are one launch: whole-number sums of groups, scales after (`kernels/w4/row_mix.py`).

The paper's score is "fisher"; "gauss-newton" is ours, needs no noise, and predicts the error itself. The paper's
inputs have a scale for each group of 128 as well; here each token has one. Layers at the model's ends stay in full
precision, as the paper leaves embedding and head; 8 bits for the model's input alone are more error on the embedded
DiT than all that 10 % of rows leave. With rows=0 this is W4A8 in the same format and rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..allocation.mixed_rows import WIDE, mixed_plan
from ..allocation.row_report import ChosenRows
from ..allocation.row_task import RowTask
from ..allocation.salient_rows import chosen_rows, salience
from ..calibration.evidence import chosen_calls
from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.plan import Int4Plan, LayerPlan
from ..layers.row_mix import RowMixPlan
from ..layers.view import LayerView
from ..options import option
from ..quantization.pictures import PICTURES, Picture
from ..quantization.recipe import register
from .choices import ACTIVATIONS, FIRST_LAST, GROUP_SIZES
from .eight_bit import IntegerConfig

CLIPS = {"output": "output-checked", "mse": "mse", "none": "max"}


@register("mixllm")
@dataclass(repr=False)
class MixLLMConfig(IntegerConfig):
    """MixLLM. Options of IntegerConfig, with defaults of its own, and:

    rows: the share of all output rows, of the layers that have 4 bits otherwise, that gets 8. Rows of many inputs
        have larger scores, so that their share of the weights is larger, too: where layers differ in inputs a tenth
        of the rows may be a quarter of the weights, 5 bits on average. The report says both.
    importance: how rows are ranked: "gauss-newton", "fisher" or another score, on `num_tuples` calibration tuples.
    time_bins: equal parts of the time for which scores are kept apart, to say which rows matter when. Each has
        draws of its own, so that another number of parts may choose some other rows.
    clip: how far groups reach: "output", 80 to 100 % by the error of the layer's output, "mse", of the weight, or
        "none".

    `outcome` (allocation.row_report.ChosenRows) is what was found, once the recipe was resolved; there is none with
    rows=0 or 1, and of a plan that was followed.
    """

    rows: float = option(0.10, "share of output rows that get 8 bits", low=0.0, high=1.0)
    format: str = option("int8", fixed=True)
    weight_bits: int = option(4, fixed=True)
    group_size: int | None = option(128, "of weights: 32, 64 or 128", parse=int, choices=GROUP_SIZES[1:])
    affine: bool = option(True, fixed=True)
    weight_grid: str = option("uniform", fixed=True)
    rotate_inputs: bool = option(False, fixed=True)
    codebook_of: str = option("tensor", fixed=True)
    average_bits: float | None = option(None, fixed=True)
    importance: str = option("gauss-newton", "how rows are ranked: gauss-newton, fisher or another")
    time_bins: int = option(10, "parts of the time for which salience is told apart", low=1, high=1000)
    activations: str = option("dynamic", "input grids from calibration, or dynamic", choices=ACTIVATIONS)
    first_last: str = option("keep", "the layers at the model's ends", choices=FIRST_LAST)
    rounding: str = option("gptq", "how weights are rounded: nearest, or gptq by calibration inputs")
    clip: str = option("output", "how far groups of weights reach", choices=tuple(CLIPS))
    num_tuples: int = option(128, "calibration tuples that scores, roundings and clipping look at", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._outcome: ChosenRows | None = None  # no choice, so no field

    @property
    def outcome(self) -> ChosenRows:
        """What was found. Raises UserError where no rows were chosen: before the recipe was resolved, for one."""
        if self._outcome is None and self.plan is None and not self.ranks_rows:
            raise UserError(f"rows={self.rows:g} leaves no rows to choose, so that there is no outcome.")
        return self.resolved(self._outcome)

    @property
    def ranks_rows(self) -> bool:
        return 0 < self.rows < 1

    def ranges(self) -> tuple[str, float | None]:
        """The range objective of the weights, which has no parameter."""
        return CLIPS.get(self.clip, self.clip), None

    def resolve(
        self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None
    ) -> dict[str, LayerPlan]:
        """A plan for each layer; the chosen rows have 8 bits."""
        plans = super().resolve(model, views, store)
        mixed = [
            view
            for view in views
            if isinstance(plans.get(view.name), Int4Plan) and getattr(view.module, "groups", 1) == 1
        ]
        if not self.rows:
            return plans
        if not mixed:
            raise UserError("MixLLM has no layer to choose rows from: none of the plan has weights of 4 bits.")
        if self.rows == 1:
            return {
                **plans,
                **{view.name: mixed_plan(plans[view.name], _all(view), len(_all(view))) for view in mixed},
            }
        self._outcome = chosen = self._chosen(model, mixed, plans, store)
        for view in mixed:
            plans[view.name] = mixed_plan(plans[view.name], chosen.rows[view.name], len(view.weight))
        return plans

    def _chosen(
        self, model: nn.Module, views: list[LayerView], plans: dict[str, LayerPlan], store: CalibrationStore | None
    ) -> ChosenRows:
        """The rows of 8 bits, by errors of nearest codes without clipping."""
        calls = None if store is None else chosen_calls(store.recorded(), self.num_tuples)
        narrow = {view.name: replace(plans[view.name], objective="max", objective_parameter=None) for view in views}
        task = RowTask(model, views, self.weight_bits, calls=calls, seed=self.seed, narrow=narrow)
        scores = salience(task, self.importance, self.time_bins)
        rows = chosen_rows(scores.total, self.rows)
        weights = sum(view.weight.numel() for view in views)
        wide = sum(len(rows[view.name]) * view.weight[0].numel() for view in views)
        bits = self.weight_bits + (WIDE - self.weight_bits) * wide / weights
        return ChosenRows(scores, rows, self.rows, wide / weights, bits)

    def found(self) -> dict[str, Any]:
        """Shares of 8-bit rows by type of layer."""
        return {} if self._outcome is None else self._outcome.found()


def _all(view: LayerView) -> list[int]:
    return list(range(len(view.weight)))


PICTURES["mixllm"] = Picture(
    "rows of 8 bits over time",
    lambda plan: isinstance(plan, RowMixPlan),
    lambda config: 0 < config.rows < 1,
    whole=lambda config, path: config.outcome.draw(path),
)
