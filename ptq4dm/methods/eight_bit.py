"""What RTN and PTQ4DM share: weights of 8 bits and less, inputs of 8 bits and less per tensor or token."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..allocation.importance import IMPORTANCE, RowTask
from ..allocation.mixed_rows import with_wide_rows
from ..allocation.roles import allocate, edge_role
from ..calibration.evidence import chosen_calls
from ..calibration.store import CalibrationStore
from ..layers.codebook import TABLES, CodebookPlan
from ..layers.plan import Int4Plan, LayerPlan
from ..layers.power import PowerPlan
from ..layers.progressive import ProgressivePlan
from ..layers.registry import needs_of
from ..layers.view import LayerView
from ..options import option, whole_or_row
from ..quantization.input_grids import Fed, by_prediction, captured_inputs, fp8_scale, unseen, with_input_grid
from ..quantization.recipe import QuantConfig
from ..ranges.registry import OBJECTIVES, objective_parameter, weights_need
from ..rounding.registry import ROUNDERS
from ..seams.first import Found
from ..seams.measure import check_split, parted_inputs
from .choices import ACTIVATIONS, FIRST_LAST, GRIDS, GROUP_SIZES, NUMBER_FORMATS, check_options


@dataclass(repr=False)
class IntegerConfig(QuantConfig):
    """Quantization of weights and inputs of every Linear and Conv2d.

    format: "int8", or "fp8": e4m3 floats, 8 and 8 bits, symmetric, with ranges that reach to the largest value
        whatever the objective (their steps grow with the value, so there is little to gain by clipping).
    weight_bits: 8; or 4, stored in 4 bits; 2 and 3 are narrower grids in 4 bits; 5, 6 and 7 are `simulated` in int8
        containers.
    activation_bits: 8; narrower grids are `simulated`.
    group_size: of weights in 4 bits: 32, 64 or 128 inputs per scale; None gives each output one. Layers whose inputs
        do not divide into groups (of a convolution, its channels) have one scale an output; the report says so.
    affine: weights in 4 bits with zero points.
    weight_grid: "uniform"; "codebook", 16 levels of 4 bits that are fitted to the weight, and to what layers are fed
        where rounding or objective look at that (layers/codebook.py); "progressive", of 4 bits with zero points, with
        scales that are whole steps of an 8-bit weight, so that an 8-bit product has it exactly
        (layers/progressive.py); or "power", whose steps grow with the weight (layers/power.py): `simulated`, for its
        levels are floats. Layers that `first_last` gives 8 bits stay uniform.
    codebook_of: whose levels a codebook has: of the whole "tensor", or of each "row", with 16 bytes an output more.
    rotate_inputs: of progressive weights: inputs are turned by Hadamard matrices in every call, in layers whose
        output on calibration inputs has a smaller error for it. Inputs are "dynamic" then.
    average_bits: rows of weights get 8 bits, the most important first, until the mean width of all weights that
        would have weight_bits is this; the layers at the model's ends, where they have 8 bits, are not counted.
    importance: how rows are ranked for it: "integrated", "endpoint", "gradient", "gauss-newton" or "fisher", on
        `num_tuples` calibration tuples, "magnitude", or "random" by `seed` (allocation/importance.py).
    activations: "static" (one scale and zero point per tensor, from calibration) or "dynamic" (symmetric, per
        token in Linear and per sample in Conv2d, computed in each call; needs no calibration). A layer that
        calibration never reached is "dynamic" in either case.
    symmetric: static activation grids without a zero point.
    split_inputs: inputs that the model concatenates (a UNet's hidden states and skips, for one) get a static grid for
        each part, and so does the first token of texts where it is far above the rest (of int8 weights), where that
        pays (seams/parts.py, first.py); calls of the store are made again to see them.
    first_last: the layers that read the model's input channels and write its output channels: "int8" (at
        least 8 bits, PTQ4DM's rule), "same" (no exception) or "keep" (full precision).
    rounding: of weights: "nearest", or "gptq" and others of rounding.ROUNDERS that look at calibration inputs.
    num_tuples: calibration tuples that roundings and objectives look at, evenly from the store; seed: of the input
        rows that are kept.
    prefix: "exact", or "quantized": roundings then see what the layers packed before make of their inputs.
    """

    format: str = option("int8", "number format of weights and inputs", choices=NUMBER_FORMATS)
    weight_bits: int = option(
        8, "8, or 4 stored as such; 2 and 3 in 4 bits, 5 to 7 simulated in int8 containers", low=2, high=8
    )
    activation_bits: int = option(8, "8; narrower grids are simulated", low=2, high=8)
    group_size: int | None = option(
        None,
        "of 4-bit weights: 32, 64 or 128 inputs to a scale; row: one an output, as without",
        parse=whole_or_row,
        choices=GROUP_SIZES,
    )
    affine: bool = option(False, "4-bit weights with zero points")
    weight_grid: str = option(
        "uniform",
        "of weights: uniform; codebook, 16 fitted levels; progressive, 4 bits in 8; or power, which is simulated",
        choices=GRIDS,
    )
    codebook_of: str = option("tensor", "levels of a codebook: of the whole tensor, or of each row", choices=TABLES)
    rotate_inputs: bool = option(False, "turn inputs of progressive weights by Hadamard matrices where that helps")
    average_bits: float | None = option(
        None,
        "rows of weights get 8 bits, the most important first, until the weights' average width is this",
        parse=float,
    )
    importance: str = option(
        "integrated",
        "how rows are ranked: integrated, endpoint, gradient, gauss-newton, fisher, magnitude or random",
    )
    activations: str = option("static", "input grids from calibration, or dynamic", choices=ACTIVATIONS)
    symmetric: bool = option(False, "static inputs without a zero point")
    split_inputs: bool = option(False, "grids for parts of concatenated inputs, and first tokens, where that pays")
    first_last: str = option("int8", "the layers at the model's ends", choices=FIRST_LAST)
    rounding: str = option("nearest", "how weights are rounded: nearest, or gptq by calibration inputs")
    num_tuples: int = option(32, "calibration tuples that roundings and objectives look at", low=1)
    seed: int = option(0, "of the input rows that are kept", flag=False, low=0)
    prefix: str = option("exact", "what roundings see: inputs of the exact model or, quantized, of what is packed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle()
        check_options(self)

    def settle(self) -> None:
        """Work out options that follow from others of the method, before it is looked whether all go together."""

    @property
    def packs_while_loading(self) -> bool:  # type: ignore[override]  # here options decide
        """Whether each layer can be packed as its weight arrives: nothing looks at what layers are fed, or at several
        layers at once."""
        together = self.ranks_rows or self.split_inputs
        return not self.looks and (self.plan is not None or not together)

    @property
    def ranks_rows(self) -> bool:
        """Whether rows are ranked, all of them at once, before any layer is packed."""
        return self.average_bits is not None

    @property
    def looks(self) -> frozenset[str]:
        """The evidence that rounding, range objective and importance look at."""
        chosen = not self.ranks_rows or self.plan is not None
        ranking = frozenset() if chosen else IMPORTANCE.find(self.importance).needs
        objective = OBJECTIVES.find(self.ranges()[0])
        ranges = objective.needs if self._asks_model else weights_need(self.ranges()[0])
        turns = frozenset({"rows"}) if self.rotate_inputs and self.plan is None else frozenset()
        return ROUNDERS.find(self.rounding).needs | ranges | ranking | turns

    @property
    def looks_at_tuples(self) -> bool:
        return bool(self.looks)

    @property
    def _asks_model(self) -> bool:
        """Whether the model is run for the choice of ranges: of static int8 grids that no plan names yet."""
        chooses = self.activations == "static" and self.format == "int8" and self.plan is None
        return chooses and "model" in OBJECTIVES.find(self.ranges()[0]).needs

    def ranges(self) -> tuple[str, float | None]:
        """The range objective of this method, and its parameter."""
        return "max", None

    @property
    def needs_calibration(self) -> bool:
        return self.activations == "static" or bool(self.looks) or super().needs_calibration

    def otherwise(self, loading: bool = False) -> str:
        dynamic = copy.copy(self)
        dynamic.__dict__["activations"] = "dynamic"
        return "" if dynamic.needs_calibration else ", or choose activations='dynamic'"

    def resolve(
        self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None
    ) -> dict[str, LayerPlan]:
        """A plan for each layer; those at the model's ends as `first_last` says."""
        parts: dict[str, Found] = {}
        if self.split_inputs:
            parts = parted_inputs(model, views, cast(CalibrationStore, store).recorded())
        if self._asks_model:
            store = cast(CalibrationStore, store)  # make_plan has asked for one
            made = lambda one, fed: self._allocated([one], store, fed, parts)  # noqa: E731
            plans = by_prediction(model, views, store, self.num_tuples, self.ranges()[0], made, self.method)
        else:
            plans = self._allocated(views, store, self._inputs(model, views, store), parts)
        if parts:
            check_split(plans.values(), parts)
        if self.average_bits is None:
            return plans
        calls = None if store is None else chosen_calls(store.recorded(), self.num_tuples)
        task = RowTask(model, views, self.weight_bits, *self.ranges(), calls, self.seed)
        return with_wide_rows(plans, task, self.importance, self.average_bits)

    def _allocated(
        self, views: list[LayerView], store: CalibrationStore | None, fed: Fed, parts: dict[str, Found]
    ) -> dict[str, LayerPlan]:
        edge = None if self.first_last == "keep" else lambda view: self._plan(view, store, fed, parts, True)
        inner = lambda view: self._plan(view, store, fed, parts, False)  # noqa: E731
        return allocate(views, {"edge": edge, "inner": inner}, edge_role)

    def _inputs(self, model: nn.Module, views: list[LayerView], store: CalibrationStore | None) -> Fed:
        """What captures LayerEvidence block by block, or gives None where the objective needs none."""
        if self.activations == "dynamic" or self.format == "fp8" or not OBJECTIVES.find(self.ranges()[0]).needs:
            return lambda view, plan: None
        store = cast(CalibrationStore, store)  # make_plan has asked for one
        return captured_inputs(model, views, store, self.num_tuples, self.seed)

    def _plan(
        self, view: LayerView, store: CalibrationStore | None, fed: Fed, parts: dict[str, Found], edge: bool
    ) -> LayerPlan:
        """One layer's plan; at an edge the weight has 8 bits where `first_last` says so."""
        if self.format == "fp8":
            scale = fp8_scale(view, cast(CalibrationStore, store)) if self.activations == "static" else None
            return LayerPlan("fp8", input_scale=scale, rounding=self.rounding)
        weight_bits, activation_bits = self.weight_bits, self.activation_bits
        if edge and self.first_last == "int8":
            weight_bits = activation_bits = 8
        if self.weight_grid == "power" and not (edge and self.first_last == "int8"):
            plan: LayerPlan = PowerPlan(weight_bits=weight_bits, activation_bits=activation_bits)
        elif self.weight_grid == "progressive" and weight_bits <= 4:
            turn = None if self.rotate_inputs else 0
            plan = ProgressivePlan(activation_bits=activation_bits, group_size=self._groups(view), rotation=turn)
        elif self.weight_grid == "codebook" and weight_bits <= 4:
            plan = CodebookPlan(
                activation_bits=activation_bits, group_size=self._groups(view), levels=self.codebook_of
            )
        elif weight_bits <= 4:
            plan = Int4Plan(
                weight_bits=weight_bits, activation_bits=activation_bits, group_size=self._groups(view),
                affine=self.affine,
            )  # fmt: skip
        else:
            plan = LayerPlan("int8", weight_bits, activation_bits)
        objective, parameter = self.ranges()
        parameter = objective_parameter(objective, parameter)
        plan.objective, plan.objective_parameter, plan.rounding = objective, parameter, self.rounding
        if self.activations == "static":
            plan = with_input_grid(plan, view, cast(CalibrationStore, store), self.symmetric, fed, parts)
        if store is not None and needs_of(plan) and unseen(view, store):
            plan.rounding, plan.objective, plan.objective_parameter = "nearest", "max", None
            if isinstance(plan, ProgressivePlan):
                plan.rotation = 0
        return plan

    def _groups(self, view: LayerView) -> int | None:
        """The group size, if the layer's inputs divide into such groups."""
        channels = view.weight.shape[1]
        if isinstance(view.module, nn.Conv2d):
            channels = view.module.in_channels // view.module.groups
        return self.group_size if self.group_size and channels % self.group_size == 0 else None
