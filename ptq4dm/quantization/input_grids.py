"""Static grids of layers' inputs from a calibration store: the part of a plan that calibration decides.

What objectives look at beside the store's statistics is given by a function Fed: (view, its plan without an input
grid) -> LayerEvidence, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..calibration.evidence import Evidence, calibration_batches
from ..calibration.store import CalibrationStore
from ..calibration.trace import block_of
from ..evidence import LayerEvidence
from ..kernels.formats import fp8
from ..layers.plan import LayerPlan
from ..layers.split.choices import SplitChoices
from ..layers.split.first import FirstTokenPlan
from ..layers.view import LayerView
from ..progress import progress_bar
from ..ranges.inputs import activation_grid
from ..ranges.registry import OBJECTIVES
from ..reconstruction.prediction import PredictionDifference, batches_across
from ..seams.first import FirstToken, Found, first_where_it_pays, scaled
from ..seams.parts import Histogram, mapped, split_where_it_pays
from ..walk.walk import Walks

Fed = Callable[[LayerView, LayerPlan], LayerEvidence | None]


def int8_grid(
    view: LayerView,
    store: CalibrationStore,
    bits: int,
    objective: str,
    parameter: float | None,
    symmetric: bool = False,
    evidence: LayerEvidence | None = None,
    statistics: Histogram | None = None,
) -> tuple[float, int] | tuple[None, None]:
    """(scale, zero point) of a layer's input, integers of `bits`; (None, None) if calibration never reached it.

    statistics: of what is rounded, where that is not the input as it comes.
    """
    histogram, limit, low, high = statistics or store.input_of(view.name)
    if low > high:
        return None, None
    device = view.module.weight.device
    histogram = histogram.to("cpu" if device.type == "meta" else device)  # the search is quick on a GPU
    weight = None if evidence is None else view.weight.detach().float()
    return activation_grid(histogram, limit, low, high, bits, objective, parameter, symmetric, evidence, weight)


def with_input_grid(
    plan: LayerPlan,
    view: LayerView,
    store: CalibrationStore,
    symmetric: bool,
    fed: Fed,
    parts: Mapping[str, Found],
) -> LayerPlan:
    """The plan with a static grid of the layer's input, under the plan's objective; with one for each part of it,
    where the layer is among `parts` and that pays."""
    statistics, found = None, parts.get(view.name)
    asks_model = "model" in OBJECTIVES.find(plan.objective).needs
    if isinstance(found, FirstToken):
        plan = first_where_it_pays(plan, view, found, symmetric)
        if isinstance(plan, FirstTokenPlan):
            if not asks_model:
                return plan
            statistics = scaled(found, plan)
    elif found is not None:
        plan = split_where_it_pays(plan, view, found, symmetric, None if asks_model else fed(view, plan))
        if isinstance(plan, SplitChoices):
            if not asks_model:
                return plan
            statistics = mapped(found, plan)
    plan.input_scale, plan.input_zero_point = int8_grid(
        view, store, plan.activation_bits, plan.objective, plan.objective_parameter, symmetric, fed(view, plan),
        statistics,
    )  # fmt: skip
    return plan


def fp8_scale(view: LayerView, store: CalibrationStore) -> float | None:
    """The scale of a layer's input in e4m3, which reaches to its largest value; None if calibration never did."""
    _, _, low, high = store.input_of(view.name)
    if low > high:
        return None
    scale = max(-low, high) / fp8.LIMIT
    return scale if scale >= torch.finfo(torch.float32).tiny else 1.0


def unseen(view: LayerView, store: CalibrationStore) -> bool:
    """Whether calibration never reached a layer: nothing is known of its input."""
    _, _, low, high = store.input_of(view.name)
    return low > high


def captured_inputs(
    model: nn.Module, views: list[LayerView], store: CalibrationStore, num_tuples: int, seed: int
) -> Fed:
    """What layers are fed on `num_tuples` calibration tuples, captured once for each block; None of unseen layers.

    In the order of the views the model goes on from block to block; for one before the last it begins anew.
    """
    batches = calibration_batches(store.recorded(), num_tuples)
    blocks: dict[str, Evidence] = {}  # of one block at a time
    order = list(dict.fromkeys(block_of(v.name) for v in views))
    walk, stands = Walks(model).over(batches), 0

    def fed(view: LayerView, plan: LayerPlan) -> LayerEvidence | None:
        nonlocal walk, stands
        if unseen(view, store):
            return None
        block = block_of(view.name)
        if block not in blocks:
            blocks.clear()
            place = order.index(block)
            if place < stands:
                walk = Walks(model).over(batches)
            stands = place
            walk.on({v.name for v in views if block_of(v.name) in order[place:]}, {})
            names = [v.name for v in views if block_of(v.name) == block]
            blocks[block] = Evidence(model, names, [], batches, seed, resumed=walk.resumed)
        return blocks[block].of(view.name)

    return fed


def by_prediction(
    model: nn.Module,
    views: list[LayerView],
    store: CalibrationStore,
    num_tuples: int,
    objective: str,
    made: Callable[[LayerView, Fed], dict[str, LayerPlan]],
    title: str,
) -> dict[str, LayerPlan]:
    """Layer name -> plan, made in the order of the layers' calls: each sees what was chosen for those before it.

    made: (view, Fed) -> the layer's plan by its name, or {}. title: of the progress bar.
    """
    targets = getattr(OBJECTIVES.find(objective), "targets", None)
    difference = PredictionDifference(model, batches_across(store.recorded(), num_tuples), targets)

    def fed(view: LayerView, plan: LayerPlan) -> LayerEvidence | None:
        return None if unseen(view, store) else difference.of(view.name, plan)

    plans: dict[str, LayerPlan] = {}
    bar = progress_bar(difference.in_call_order(views), desc=title, unit="layer")
    for view in bar:
        for name, plan in made(view, fed).items():
            plans[name] = plan
            if (error := difference.settle(name, plan)) is not None:
                bar.set_postfix(error=f"{error:.2e}")
    return {view.name: plans[view.name] for view in views if view.name in plans}
