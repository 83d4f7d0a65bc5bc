"""From a recipe to a plan, and whether a plan fits a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..calibration.store import CalibrationStore
from ..errors import UserError
from ..layers.attention.planned import check_attention
from ..layers.choices import check_fit
from ..layers.plan import Plan
from ..layers.registry import FORMATS, needs_of
from ..layers.rotated.choices import with_rotations
from ..layers.shift.norms import is_norm
from ..layers.view import find_layers
from ..rounding.registry import ROUNDERS
from ..transforms.base import TransformPlan
from .packing import packing_of
from .recipe import QuantConfig
from .training import check_trained


def make_plan(
    model: nn.Module,
    config: QuantConfig,
    store: CalibrationStore | None = None,
    transforms: Sequence[TransformPlan] = (),
) -> Plan:
    """Resolve a recipe against a model in full precision; the caller loads `config.calibration`.

    transforms: those that the model went through; layers whose inputs they rotate are planned so.

    Raises:
        UserError: the recipe needs calibration that is not there, the store is of another model, or no layer
            is left to quantize.
    """
    if store is None and config.needs_calibration:
        raise UserError(
            f"{type(config).__name__} needs calibration: pass a store from ptq4dm.collect(pipe){config.otherwise()}."
        )
    if store is not None:
        store.check_model(model)
    views = find_layers(model, config.modules_to_not_convert)
    layers = with_rotations(config.resolve(model, views, store), transforms)
    plan = Plan(config.method, layers, list(transforms), learning=config.learning())
    if any(needs_of(choice) for choice in plan.layers.values()):
        plan.packing = config.packing_options()
    if not plan.layers:
        raise UserError("no layer of the model is left to quantize; check modules_to_not_convert.")
    return plan


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises UserError where a plan names layers that the model does not have, or its choices are not of their type,
    out of range, or not for the layer that they name."""
    if not plan.layers and not plan.norms:
        raise UserError("the plan names no layer, so there is nothing to quantize.")
    known = {view.name for view in find_layers(model)}
    missing = [name for name in plan.layers if name not in known]
    if missing:
        raise UserError(
            f"the plan is of another model: it names {len(missing)} layers that are not there (first '{missing[0]}')."
        )
    modules = dict(model.named_modules())
    if strange := [name for name in plan.norms if not is_norm(modules.get(name))]:
        raise UserError(f"the plan is of another model: '{strange[0]}' is no norm of it.")
    plan.check()
    check_attention(model, plan.attention)
    packing_of(plan.packing)
    check_trained(plan)
    for name, layer in plan.layers.items():
        check_fit(name, layer, model.get_submodule(name))
        grid, rounding = FORMATS.find(layer.format).grid, getattr(layer, "rounding", "nearest")
        if grid not in ROUNDERS.find(rounding).grids:
            raise UserError(f"layer '{name}': rounding '{rounding}' does not serve format '{layer.format}'.")
